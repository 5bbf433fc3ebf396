"""Tokenizers of mistral-common against the package itself; skipped where it is not installed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import taco.entrypoints.llm as llm_module
from taco.engine.detokenizer import make_detokenizer
from taco.entrypoints.llm import LLM
from taco.entrypoints.vllm_functions import resolve_chat_template
from taco.errors import TacoValidationError
from taco.models.loader.source import ModelSource
from taco.sampling_params import SamplingParams
from taco.tokenizer import add_vocabulary_limits, load_tokenizer
from tests.fake_engine import FakeEngine, make_config
from tests.tiny_tokenizers import byte_level_tokenizer

mistral_common: Any
try:
    import mistral_common
except ImportError:
    mistral_common = None
needs_package = pytest.mark.skipif(mistral_common is None, reason="mistral-common is not installed (extra: mistral)")

FILES = {
    "tokenizer.model.v1": "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240323.model.v3": "tokenizer.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7": "tokenizer.model.v7",
    "tekken_240911.json": "tekken.json",
}
TEXTS = [
    "hello",
    "  two spaces, then a\nline\n\n",
    "naïve 🙂 日本語 \x00",
    "<s>[INST] no special token </s>",
    "",
    "a" * 40,
    " ",
]
USER = {"role": "user", "content": "Is <s> naïve 🙂?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "It is 4."}
CALL = {"id": "call56789", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module", params=FILES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistral")
    data = Path(mistral_common.__file__).parent / "data"
    shutil.copy(data / request.param, path / FILES[request.param])
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder), tokenizer_mode="mistral")


@pytest.fixture(scope="module")
def own(folder: Path) -> Any:
    """The package's own tokenizer."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(str(next(folder.iterdir())))


@pytest.fixture
def llm(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> LLM:
    config = make_config(vocab_size=len(tokenizer), max_model_len=1000)
    engine = FakeEngine(config, tokenizer, lambda request: 1000 + request.num_output_tokens)
    monkeypatch.setattr(llm_module.LLMEngine, "from_engine_args", lambda engine_args: engine)
    return LLM("fake")


@needs_package
def test_texts_are_encoded_as_the_package_does(tokenizer: Any, own: Any, llm: LLM) -> None:
    encode = own.instruct_tokenizer.tokenizer.encode
    for add_special_tokens in (True, False):
        ids = tokenizer(TEXTS, add_special_tokens=add_special_tokens, return_token_type_ids=False)["input_ids"]
        assert ids == [encode(text, bos=add_special_tokens, eos=False) for text in TEXTS]
    add_vocabulary_limits(tokenizer)
    assert tokenizer.max_token_id == len(tokenizer) - 1
    # The start token comes from the tokenizer; what a text spells out is text.
    (output,) = llm.generate("<s>hello", SamplingParams(max_tokens=1), use_tqdm=False)
    assert output.prompt_token_ids == encode("<s>hello", bos=True, eos=False)


@needs_package
def test_special_tokens_are_those_of_the_package(tokenizer: Any, own: Any) -> None:
    tokens = own.instruct_tokenizer.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (tokens.bos_id, tokens.eos_id)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


@needs_package
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_tokens_become_text_again(tokenizer: Any, own: Any, skip_special_tokens: bool) -> None:
    detokenizer = make_detokenizer(tokenizer)
    options: Any = {"skip_special_tokens": skip_special_tokens, "spaces_between_special_tokens": True}
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, **options) == text
        assert detokenizer.decode([], ids, **options) == text
        stream = detokenizer.stream([], **options)
        assert "".join(map(stream.append, ids)) == text
        assert own.decode(ids) == text
    bos = tokenizer.bos_token_id
    assert tokenizer.decode([bos, *tokenizer("a b", add_special_tokens=False)["input_ids"], 2], **options) in (
        ("a b",) if skip_special_tokens else ("<s>a b</s>", "<s> a b</s>")
    )
    # Models pad their vocabularies.
    assert detokenizer.decode([], [len(tokenizer) + 5], **options) == ""


@needs_package
@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([USER], {}),
        ([SYSTEM, USER, ANSWER, USER], {}),
        ([USER, ANSWER], {"add_generation_prompt": False, "continue_final_message": True}),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {}),
    ],
)
def test_chats_are_encoded_as_the_package_does(
    own: Any, llm: LLM, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from transformers.tokenization_mistral_common import MistralCommonBackend

    continues = options.get("continue_final_message", False)
    request = ChatCompletionRequest.from_openai(messages, continue_final_message=continues)
    wanted = own.encode_chat_completion(request).tokens
    (output,) = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False, **options)
    assert output.prompt_token_ids == wanted
    assert wanted.count(llm.get_tokenizer().bos_token_id) == 1
    tokenizer = llm.get_tokenizer()
    options = {"add_generation_prompt": True, **options}
    backend = MistralCommonBackend.apply_chat_template(tokenizer, messages, tokenize=True, return_dict=False, **options)
    assert backend == wanted


@needs_package
def test_tools_are_encoded_as_the_package_does(own: Any, llm: LLM) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    if own.instruct_tokenizer.tokenizer.version.value in ("v1", "v2"):
        pytest.skip("this version knows no tools")

    def f() -> None:
        """d"""

    result = {"role": "tool", "tool_call_id": "call56789", "name": "f", "content": "3"}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, result]
    request = ChatCompletionRequest.from_openai(
        [messages[0], {"role": "assistant", "tool_calls": [CALL]}, result], tools=TOOLS
    )
    (output,) = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False, tools=TOOLS)
    assert output.prompt_token_ids == own.encode_chat_completion(request).tokens
    (output,) = llm.chat([USER], SamplingParams(max_tokens=1), use_tqdm=False, tools=[f])
    assert '"name": "f"' in llm.get_tokenizer().decode(output.prompt_token_ids)


@needs_package
def test_what_cannot_be_encoded_is_an_error_of_its_row(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1)
    with pytest.raises(TacoValidationError, match="continue_final_message"):
        llm.chat([USER, ANSWER], params, use_tqdm=False)
    with pytest.raises(TacoValidationError, match='takes no chat_template.*tokenizer_mode="auto"'):
        llm.chat([USER], params, use_tqdm=False, chat_template="{{ messages }}")
    assert resolve_chat_template(llm.get_tokenizer()) is None
    good, bad = llm.chat([[USER], [ANSWER]], params, use_tqdm=False, on_error="return")
    assert good.error is None and bad.error is not None


@needs_package
def test_the_mode_and_not_what_is_installed_chooses_the_files(folder: Path, tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    for file in folder.iterdir():
        shutil.copy(file, tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == len(byte_level_tokenizer())
    assert len(load_tokenizer(str(tmp_path), tokenizer_mode="mistral")) > 1000


@needs_package
def test_a_folder_without_mistrals_files_is_an_error(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    for source in (str(tmp_path), ModelSource("gguf", "model.gguf")):
        with pytest.raises(TacoValidationError, match=r"tekken.json or tokenizer.model.vN.*tokenizer_mode=\"auto\""):
            load_tokenizer(source, tokenizer_mode="mistral")


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    with pytest.raises(TacoValidationError, match=r'pip install "taco-llm\[mistral\]"'):
        load_tokenizer(str(tmp_path), tokenizer_mode="mistral")
