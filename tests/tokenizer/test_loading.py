from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader import source as source_module
from taco.models.loader.source import ModelSource
from taco.tokenizer import add_vocabulary_limits, load_tokenizer
from tests.tiny_tokenizers import byte_level_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_gives_its_tokenizer(folder: Path) -> None:
    text = "hello <é> world </s>"
    for source in (str(folder), ModelSource("hf", str(folder))):
        tokenizer = load_tokenizer(source)
        assert tokenizer(text)["input_ids"] == byte_level_tokenizer()(text)["input_ids"]
        assert tokenizer.chat_template == byte_level_tokenizer().chat_template


def test_a_hub_id_is_found_with_its_revision_token_and_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, object]]] = []

    def resolve_model(model: str, **options: object) -> ModelSource:
        calls.append((model, options))
        return ModelSource("hf", str(folder))

    monkeypatch.setattr(source_module, "resolve_model", resolve_model)
    load_tokenizer("org/tokenizer", revision="v2", download_dir="/d", hf_token="secret")
    wanted = {"revision": "v2", "download_dir": "/d", "hf_token": "secret", "load_format": "dummy"}
    assert calls == [("org/tokenizer", wanted)]


def test_the_truncation_side_is_set(folder: Path) -> None:
    assert load_tokenizer(str(folder)).truncation_side == "right"
    tokenizer = load_tokenizer(str(folder), truncation_side="left")
    ids = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    assert tokenizer("hello world", add_special_tokens=False, truncation=True, max_length=2)["input_ids"] == ids[-2:]


BERT_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "!"]
SLOW_CODE = """
from transformers import ByT5Tokenizer

class SlowTokenizer(ByT5Tokenizer):
    pass
"""


def test_the_slow_mode_loads_the_implementation_in_python(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_VOCABULARY))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    fast = load_tokenizer(str(tmp_path))
    slow = load_tokenizer(str(tmp_path), tokenizer_mode="slow")
    assert fast.is_fast and not slow.is_fast
    text = "The cats sat!"
    assert slow(text)["input_ids"] == fast(text)["input_ids"] == [2, 5, 6, 8, 7, 9, 3]

    python_alone = tmp_path / "byt5"
    transformers.ByT5Tokenizer().save_pretrained(python_alone)
    for mode in ("auto", "slow"):
        assert type(load_tokenizer(str(python_alone), tokenizer_mode=mode)) is transformers.ByT5Tokenizer


def test_the_slow_mode_loads_the_slow_class_that_a_model_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    folder = tmp_path / "brought"
    byte_level_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["brought.SlowTokenizer", "brought.FastTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    fast_code = "from transformers import PreTrainedTokenizerFast\nclass FastTokenizer(PreTrainedTokenizerFast): pass\n"
    (folder / "brought.py").write_text(SLOW_CODE + fast_code)
    names = {
        mode: type(load_tokenizer(str(folder), tokenizer_mode=mode, trust_remote_code=True)).__name__
        for mode in ("auto", "slow")
    }
    assert names == {"auto": "FastTokenizer", "slow": "SlowTokenizer"}


def test_the_slow_mode_says_where_there_is_no_implementation_in_python(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TacoValidationError, match='no implementation in Python.*has for .*tokenizer_mode="auto"'):
        load_tokenizer(str(folder), tokenizer_mode="slow")
    with pytest.raises(TacoValidationError, match="no implementation in Python.*GGUF"):
        load_tokenizer(ModelSource("gguf", "model.gguf"), tokenizer_mode="slow")


def test_a_byte_level_vocabulary_under_the_name_of_llamas_class_keeps_its_spaces(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer("the cat sat")["input_ids"] == byte_level_tokenizer()("the cat sat")["input_ids"]
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"], skip_special_tokens=True) == "the cat sat"


def test_unknown_modes_and_missing_tokenizers_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="'spacy'.*auto, slow, mistral"):
        load_tokenizer(str(tmp_path), tokenizer_mode="spacy")
    for mode in ("auto", "slow"):
        with pytest.raises(TacoValidationError, match="(?s)cannot be loaded.*skip_tokenizer_init"):
            load_tokenizer(str(tmp_path), tokenizer_mode=mode)


def test_the_limits_of_a_vocabulary_count_added_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<a token that is longer than all others>"])
    add_vocabulary_limits(tokenizer)
    assert tokenizer.max_token_id == len(tokenizer) - 1
    assert tokenizer.max_chars_per_token == len("<a token that is longer than all others>")


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, taco.tokenizer; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
