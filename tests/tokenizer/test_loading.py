from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader import source as source_module
from taco.models.loader.source import ModelSource
from taco.tokenizer import load_tokenizer, max_token_id
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


def test_the_slow_mode_loads_the_same_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(str(folder), tokenizer_mode="slow")
    assert tokenizer("hello")["input_ids"] == byte_level_tokenizer()("hello")["input_ids"]
    assert "slow" in caplog.text


def test_unknown_modes_and_missing_tokenizers_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="'mistral'.*auto, slow"):
        load_tokenizer(str(tmp_path), tokenizer_mode="mistral")
    with pytest.raises(TacoValidationError, match="(?s)cannot be loaded.*skip_tokenizer_init"):
        load_tokenizer(str(tmp_path))


def test_the_largest_token_id_counts_added_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    assert max_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<é>") == len(tokenizer) - 1


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, taco.tokenizer; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
