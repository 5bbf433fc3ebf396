"""The token ids that `LLM.chat` gives to the model are those of transformers' `apply_chat_template`.

Small templates that have the traits of published ones run with tiny tokenizers; the published ones, marked `slow`, with
theirs.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import taco.entrypoints.llm as llm_module
from taco.entrypoints.llm import LLM
from taco.errors import TacoValidationError
from taco.sampling_params import SamplingParams
from taco.tokenizer import load_tokenizer
from tests.fake_engine import FakeEngine, make_config
from tests.packaged_tokenizers import NAMES, TokenizerUnavailableError, packaged_tokenizer
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level_tokenizer, sentencepiece_tokenizer

Message = dict[str, Any]
MakeLLM = Callable[[Any], LLM]


def says(role: str, content: Any, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


SYSTEM = says("system", "Be brief.")
USER = says("user", "the cat <s> sat </s>, naïve?")
ANSWER = says("assistant", "on the mat.\n")
AGAIN = says("user", "  and  then? ")
PREFIX = says("assistant", "Sure: ")
# ids of nine characters are what Mistral's templates ask for
CALLS = [
    {"id": "call56789", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn", "n": 1}}}
]
CALLING = {"role": "assistant", "tool_calls": CALLS}
RESULT = says("tool", '{"sky": "blue"}', tool_call_id="call56789", name="weather")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
        },
    }
]
# The tools of Cohere's templates.
FLAT_TOOLS = [
    {
        "name": "weather",
        "description": "Tells the weather.",
        "parameter_definitions": {"city": {"type": "str", "description": "where", "required": True}},
    }
]
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}

# Conversations that both sides take as they are.
SAME: dict[str, tuple[list[Message], dict[str, Any]]] = {
    "user": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "turns": ([USER, ANSWER, AGAIN], {}),
    "system and turns": ([SYSTEM, USER, ANSWER, AGAIN], {}),
    "no generation prompt": ([SYSTEM, USER, ANSWER], {"add_generation_prompt": False}),
    "continued": ([USER, PREFIX], CONTINUED),
    "continued after a system message": ([SYSTEM, USER, PREFIX], CONTINUED),
    "tools": ([SYSTEM, USER], {"tools": TOOLS}),
    "flat tools": ([USER], {"tools": FLAT_TOOLS}),
    "a tool was called": ([USER, CALLING, RESULT], {"tools": TOOLS}),
    "a tool was called, with words": ([USER, {**CALLING, "content": "Let me see."}, RESULT], {"tools": TOOLS}),
    "a tool was called, not listed": ([USER, {**CALLING, "content": ""}, RESULT], {}),
    "reasons": ([USER, {**ANSWER, "reasoning_content": "Cats sit."}, AGAIN], {}),
    "variables": ([USER], {"chat_template_kwargs": {"enable_thinking": False, "date_string": "1 May 2024"}}),
    "documents": ([USER], {"chat_template_kwargs": {"documents": [{"title": "T", "text": "cats"}]}}),
    "empty": ([says("user", "")], {}),
    "two users": ([USER, USER], {}),
}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> MakeLLM:
    def make(tokenizer: Any) -> LLM:
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        engine = FakeEngine(make_config(vocab_size=vocab_size, max_model_len=10_000), tokenizer, lambda request: 0)
        monkeypatch.setattr(llm_module.LLMEngine, "from_engine_args", lambda engine_args: engine)
        return LLM("fake")

    return make


def prompt_ids(llm: LLM, messages: list[Message], **options: Any) -> list[int]:
    (output,) = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False, **options)
    assert output.prompt_token_ids is not None
    return output.prompt_token_ids


def reference_ids(tokenizer: Any, messages: list[Message], **options: Any) -> list[int]:
    options = {"add_generation_prompt": True, **options}
    variables = options.pop("chat_template_kwargs", {})
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options, **variables)


def check_same(llm: LLM, **more: Any) -> list[str]:
    """Compares all conversations that transformers renders.

    Returns:
        Their names.
    """
    tokenizer = llm.get_tokenizer()
    rendered = []
    for name, (messages, options) in SAME.items():
        try:
            wanted = reference_ids(tokenizer, messages, **options, **more)
        except Exception:
            # What a template refuses in itself is refused here; missing content is filled in.
            if all("content" in message for message in messages):
                with pytest.raises(TacoValidationError, match="could not be applied"):
                    prompt_ids(llm, messages, **options, **more)
            continue
        got = prompt_ids(llm, messages, **options, **more)
        assert got == wanted, (name, tokenizer.decode(got), tokenizer.decode(wanted))
        bos = tokenizer.bos_token_id
        assert bos is None or got[:2] != [bos, bos], name
        rendered.append(name)
    return rendered


# Small templates


LAST_LINE = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
LOOP = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}" + LAST_LINE
TEMPLATES = {
    "with a start token": CHAT_TEMPLATE,
    "without a start token": LOOP,
    "start token within the first message": "{% for m in messages %}{% set text = '<|' + m.role + '|>' + "
    "m.content | trim + eos_token %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}"
    "{% endfor %}" + LAST_LINE,
    "raises": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate!') }}{% endif %}{{ m.content }}{% endfor %}",
    "tells the date": "{{ bos_token }}{{ date_string or strftime_now('%Y') }}" + LOOP,
    "tools": "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}"
    "<|{{ m.role }}|>{% if m.tool_calls %}{% for call in m.tool_calls %}<tool call>{{ call.function.name }}("
    "{{ call.function.arguments | tojson }}){% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}" + LAST_LINE,
    "marks the answers": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|a|>{% generation %}"
    "{{ m.content }}{{ eos_token }}{%- endgeneration %}{% else %}<|u|>{{ m.content }}{% endif %}{% endfor %}",
    "strings or parts": "{{ bos_token }}{% for m in messages %}{% if m.content is string %}{{ m.content | trim }}"
    "{% else %}{% for part in m.content %}{{ part.text | trim }};{% endfor %}{% endif %}{% endfor %}",
    "loops over calls that are content": "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool_calls' %}"
    "{% set calls = m.content %}{% for call in calls %}{{ call }}{% endfor %}{% else %}"
    "{{ '[' + m.content + ']' }}{% endif %}{% endfor %}",
    "thinks": "{% for m in messages %}{{ m.role }}{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}{% endfor %}{% if enable_thinking is defined and not enable_thinking %}(){% endif %}",
    "documents": "{{ bos_token }}{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}" + LOOP,
}


def roles(messages: list[Message]) -> set[str]:
    return {message["role"] for message in messages}


def with_template(tokenizer: Any, template: object) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=["byte-level", "sentencepiece"])
def tiny(request: pytest.FixtureRequest) -> Any:
    return byte_level_tokenizer() if request.param == "byte-level" else sentencepiece_tokenizer()


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_gives_the_ids_of_transformers(make: MakeLLM, tiny: Any, template: str) -> None:
    llm = make(with_template(tiny, TEMPLATES[template]))
    rendered = check_same(llm)
    left_out = {"a tool was called"}  # which not every template renders without content
    if template == "raises":
        left_out |= {name for name, (messages, _) in SAME.items() if {SYSTEM["role"], RESULT["role"]} & roles(messages)}
        left_out.add("two users")
    assert set(SAME) - set(rendered) <= left_out


def test_named_templates_give_the_ids_of_transformers(make: MakeLLM, tiny: Any) -> None:
    named = {"default": TEMPLATES["with a start token"], "tool_use": TEMPLATES["tools"], "rag": TEMPLATES["documents"]}
    llm = make(with_template(tiny, named))
    assert len(check_same(llm)) == len(check_same(llm, chat_template="rag")) == len(SAME)
    # With tools, the template of that name is taken.
    text = llm.get_tokenizer().decode(prompt_ids(llm, [USER], tools=TOOLS))
    assert "Tells the weather" in text


def test_a_template_that_trims_what_is_continued(make: MakeLLM, tiny: Any) -> None:
    llm = make(with_template(tiny, "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}"))
    assert "continued" in check_same(llm)


def test_parts_are_passed_on_where_the_template_reads_them_and_else_joined(make: MakeLLM, tiny: Any) -> None:
    parts = [says("user", [{"type": "text", "text": "the cat"}, {"type": "text", "text": " sat"}])]
    joined = [says("user", "the cat\n sat")]
    for name, template in TEMPLATES.items():
        llm = make(with_template(tiny, template))
        wanted = parts if name == "strings or parts" else joined
        assert prompt_ids(llm, parts) == reference_ids(llm.get_tokenizer(), wanted), name
    # A template for parts alone would go through the letters of a string.
    llm = make(
        with_template(tiny, "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}")
    )
    assert prompt_ids(llm, parts) == reference_ids(llm.get_tokenizer(), parts)
    one = [says("user", [{"type": "text", "text": "the cat\n sat"}])]
    assert prompt_ids(llm, joined) == reference_ids(llm.get_tokenizer(), one)


def test_chat_may_ask_for_the_tokenizers_own_special_tokens(make: MakeLLM, tiny: Any) -> None:
    special = {"tokenization_kwargs": {"add_special_tokens": True}}
    plain = make(with_template(tiny, "{{ messages[0].content }}"))
    assert prompt_ids(plain, [AGAIN], **special) == tiny(AGAIN["content"])["input_ids"]
    # and a template's start token stays the only one
    with_bos = make(with_template(tiny, CHAT_TEMPLATE))
    assert prompt_ids(with_bos, [AGAIN], **special) == prompt_ids(with_bos, [AGAIN])


def check_bos_of_texts(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """A text that begins with the start token has one, whoever writes it; doubling it is reported once."""
    tokenizer = llm.get_tokenizer()
    adds_bos = tokenizer("cat")["input_ids"][0] == tokenizer.bos_token_id
    text = tokenizer.bos_token + "the cat"
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        outputs = [
            output
            for _ in range(2)
            for output in llm.generate([text, text], SamplingParams(max_tokens=1), use_tqdm=False)
        ]
    wanted = tokenizer(text)["input_ids"][adds_bos:]
    assert wanted.count(tokenizer.bos_token_id) == 1 and wanted[0] == tokenizer.bos_token_id
    assert [output.prompt_token_ids for output in outputs] == [wanted] * 4
    warnings = [message for message in caplog.messages if "second one was left out" in message]
    assert len(warnings) == adds_bos
    assert all("Remove it from your texts" in message and "LLM.chat" in message for message in warnings)


def test_a_text_has_one_start_token(make: MakeLLM, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    check_bos_of_texts(make(tiny), caplog)
    without = copy.deepcopy(tiny)
    without._tokenizer.post_processor = None
    check_bos_of_texts(make(without), caplog)


# Published templates


# Templates that read parts themselves; for the others, taco joins them with line ends.
READ_PARTS = {"gemma3"}
# Templates that show JSON text as it is; for the others, taco decodes it.
READ_ARGUMENT_TEXTS = {"qwen3", "deepseek_v3"}
# Models with several named templates; None is the one that is taken by default.
TEMPLATE_NAMES: dict[str, list[str | None]] = {
    "aya_expanse": [None, "tool_use", "rag"],
    "command_r_plus": [None, "tool_use", "rag"],
}
WITHOUT_TEMPLATE = {"baichuan2", "deepseek", "gemma", "gemma2", "gpt2", "gpt4o", "llama2", "yi"}


@pytest.fixture(scope="module", params=NAMES)
def published(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    try:
        folder = packaged_tokenizer(request.param)
    except TokenizerUnavailableError as error:
        pytest.skip(str(error))
    yield request.param, load_tokenizer(str(folder))


@pytest.mark.slow
def test_published_templates_give_the_ids_of_transformers(make: MakeLLM, published: tuple[str, Any]) -> None:
    name, tokenizer = published
    if name in WITHOUT_TEMPLATE:
        llm = make(tokenizer)
        with pytest.raises(TacoValidationError, match="no chat template"):
            prompt_ids(llm, [USER])
        assert len(check_same(llm, chat_template=CHAT_TEMPLATE)) == len(SAME)
        return
    llm = make(tokenizer)
    for template_name in TEMPLATE_NAMES.get(name, [None]):
        more = {} if template_name is None else {"chat_template": template_name}
        rendered = check_same(llm, **more)
        if template_name is None:
            basic = {"user", "system", "turns", "system and turns", "no generation prompt", "continued", "variables"}
            assert basic <= set(rendered)
        assert rendered, template_name


@pytest.mark.slow
def test_published_templates_get_the_content_that_they_read(make: MakeLLM, published: tuple[str, Any]) -> None:
    name, tokenizer = published
    if name in WITHOUT_TEMPLATE:
        pytest.skip("it has no template")
    llm = make(tokenizer)
    parts = [{**SYSTEM, "content": [{"type": "text", "text": "Be brief."}]}]
    parts.append(says("user", [{"type": "text", "text": "the cat"}, {"type": "text", "text": " sat"}]))
    joined = [SYSTEM, says("user", "the cat\n sat")]
    assert prompt_ids(llm, parts) == reference_ids(tokenizer, parts if name in READ_PARTS else joined)

    text = '{"city":  "Bonn"}'
    for content in ("", None):
        function: dict[str, Any] = {"name": "weather", "arguments": text}
        call = says("assistant", content, tool_calls=[{**CALLS[0], "function": function}])
        try:
            got = prompt_ids(llm, [USER, call, RESULT], tools=TOOLS)
        except TacoValidationError:
            with pytest.raises(Exception, match=r"."):
                reference_ids(tokenizer, [USER, {**call, "content": ""}, RESULT], tools=TOOLS)
            continue
        if name == "deepseek_v3" and content is None:  # whose template wants None, which transformers leaves out
            assert f"weather\n```json\n{text}\n```" in tokenizer.decode(got)
            continue
        arguments = text if name in READ_ARGUMENT_TEXTS else {"city": "Bonn"}
        wanted = says("assistant", "", tool_calls=[{**CALLS[0], "function": {**function, "arguments": arguments}}])
        assert got == reference_ids(tokenizer, [USER, wanted, RESULT], tools=TOOLS)


@pytest.mark.slow
def test_a_text_for_a_published_tokenizer_has_one_start_token(
    make: MakeLLM, published: tuple[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    _, tokenizer = published
    if tokenizer.bos_token is None:
        pytest.skip("it has no start token")
    check_bos_of_texts(make(tokenizer), caplog)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("fixture", ["smollm2_path", "gemma3_path"])
def test_templates_in_gguf_files_give_the_ids_of_transformers(
    make: MakeLLM, request: pytest.FixtureRequest, fixture: str, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    path: Path = request.getfixturevalue(fixture)
    llm = make(load_tokenizer(str(path)))
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    template = {} if llm.get_tokenizer().chat_template else {"chat_template": CHAT_TEMPLATE}
    check_same(llm, **template)
    for messages in ([USER], [SYSTEM, USER, ANSWER, AGAIN]):
        assert prompt_ids(llm, messages, **template) == reference_ids(reference, messages, **template)
    check_bos_of_texts(llm, caplog)
