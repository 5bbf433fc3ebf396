from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jinja2
import pytest

from taco.compat import V0_6, V0_33, Behaviour
from taco.engine.input_processor import TokenizeOptions
from taco.entrypoints.chat import ChatOptions, ChatRenderer, content_texts, split_conversations
from taco.errors import ChatTemplateResolutionError, TacoValidationError, UnsupportedFeatureError
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level_tokenizer

SHOW = "{{ messages }}|{{ tools }}|{{ documents }}|{{ color }}"
USER = {"role": "user", "content": "hi"}


def tokenizer_with(template: Any) -> Any:
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def render(
    messages: Any,
    template: str = CHAT_TEMPLATE,
    default: str | None = None,
    behaviour: Behaviour = V0_6,
    **options: Any,
) -> Any:
    return ChatRenderer(tokenizer_with(template), ChatOptions(**options), behaviour, default).render(messages)


def test_conversation_becomes_text_with_special_tokens_and_a_generation_prompt() -> None:
    assert render([USER]) == "<s><|user|>hi</s><|assistant|>"
    assert render([USER], add_generation_prompt=False) == "<s><|user|>hi</s>"
    assert TokenizeOptions().add_special_tokens  # which is why LLM.chat turns it off


def test_final_message_can_be_continued() -> None:
    messages = [USER, {"role": "assistant", "content": "Sure, "}]
    text = render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "<s><|user|>hi</s><|assistant|>Sure, "
    with pytest.raises(TacoValidationError, match="not compatible"):
        ChatOptions(continue_final_message=True)


def test_template_of_the_call_wins_over_the_llms_which_wins_over_the_tokenizers() -> None:
    assert render([USER], "tokenizer") == "tokenizer"
    assert render([USER], "tokenizer", "{{ 'llm' }}") == "llm"
    assert render([USER], "tokenizer", "{{ 'llm' }}", chat_template="{{ 'call' }}") == "call"


def test_named_templates() -> None:
    tokenizer = tokenizer_with({"default": "plain", "other": "{{ 'other' }}", "tool_use": "tools"})
    assert ChatRenderer(tokenizer, ChatOptions(), V0_6).render([USER]) == "plain"
    assert ChatRenderer(tokenizer, ChatOptions(chat_template="other"), V0_6).render([USER]) == "other"
    assert ChatRenderer(tokenizer, ChatOptions(tools=[{"type": "function"}]), V0_6).render([USER]) == "tools"


def test_a_template_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ 'from a file' }}")
    assert render([USER], "tokenizer", chat_template=str(file)) == "from a file"
    with pytest.raises(TacoValidationError, match=r"no brace.*and no file that can be read.*other\.jinja"):
        render([USER], "tokenizer", chat_template=str(tmp_path / "other.jinja"))


def test_without_a_template_the_error_says_what_to_do() -> None:
    with pytest.raises(
        ChatTemplateResolutionError, match="default chat template is no longer allowed.*Pass chat_template"
    ):
        ChatRenderer(tokenizer_with(None), ChatOptions(), V0_6)


def test_variables_tools_and_documents_reach_the_template() -> None:
    def weather(city: str) -> str:
        """Tells the weather.

        Args:
            city: name of the city
        """
        return city

    text = render(
        [USER],
        SHOW,
        tools=[weather],
        chat_template_kwargs={"color": "blue", "documents": [{"title": "T", "text": "x"}]},
    )
    assert "'name': 'weather'" in text and "'title': 'T'" in text and text.endswith("|blue")


def test_arguments_of_chat_win_over_template_variables() -> None:
    variables = {"add_generation_prompt": False, "tokenize": True, "chat_template": "no"}
    text = render([USER], "tokenizer", chat_template=CHAT_TEMPLATE, chat_template_kwargs=variables)
    assert text.endswith("<|assistant|>")


def test_a_template_among_the_variables_wins_over_those_of_llm_and_tokenizer() -> None:
    assert render([USER], "tokenizer", "llm", chat_template_kwargs={"chat_template": "{{ 'variable' }}"}) == "variable"


def test_options_of_tokenization_are_no_variables_of_a_template() -> None:
    with pytest.raises(TacoValidationError, match=r"\['max_length', 'truncation'\].*tokenization_kwargs"):
        render([USER], chat_template_kwargs={"truncation": True, "max_length": 3, "color": "blue"})


# Content


LIST_TEMPLATES = [
    "{% for m in messages %}{% for part in m['content'] %}{{ part.text }}|{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set c = m.content %}{% for part in c | list %}{{ part.text }}|{% endfor %}{% endfor %}",
    "{% macro show(body) %}{% for p in body %}{{ p.text }}|{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endgeneration %}"
    "{% endfor %}",
    "{% for m in messages %}{{ m.content | map(attribute='text') | join('|') }}|{% endfor %}",
]
STRING_TEMPLATES = [
    "{{ messages[0].content }}|",
    "{{ messages[0].content | trim }}|",
    "{{ '' + messages[0].content }}|",
    "{% for m in messages %}{% for line in m.content.split('x') %}{{ line }}{% endfor %}|{% endfor %}",
    "{% for m in messages %}{% set content = m.role %}{% for c in content %}{% endfor %}{{ m.content }}|{% endfor %}",
    # A loop over what is content in another role alone.
    "{% for m in messages %}{% if m.role == 'calls' %}{% set calls = m.content %}{% else %}{% set calls = [] %}"
    "{% endif %}{% for call in calls %}{{ call }}{% endfor %}{{ '' + m.content }}|{% endfor %}",
]
EITHER_TEMPLATES = [
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}!{% else %}{% for p in m.content %}"
    "{{ p.text }}|{% endfor %}{% endif %}{% endfor %}",
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]}]


@pytest.mark.parametrize("template", LIST_TEMPLATES)
def test_a_template_that_reads_parts_gets_parts(template: str) -> None:
    assert render(PARTS, template) == "a|b|c|"
    assert render([USER], template) == "hi|"


@pytest.mark.parametrize("template", STRING_TEMPLATES)
def test_a_template_that_reads_strings_gets_strings(template: str) -> None:
    assert render(PARTS, template) == "a\nb\nc|"
    assert render([USER], template) == "hi|"


@pytest.mark.parametrize("template", EITHER_TEMPLATES)
def test_a_template_that_reads_both_gets_what_there_is(template: str) -> None:
    assert render(PARTS, template) == "a|b|c|"
    assert render([USER], template) == "hi!"


def test_a_template_that_shows_neither_gets_strings() -> None:
    assert render(PARTS, "{{ messages[0].content is string and messages | length == 1 }}") == "True"
    with pytest.raises(TacoValidationError, match="no thanks"):
        render(PARTS, "{{ raise_exception('no thanks') }}")


def test_the_caller_may_say_which_form_the_template_reads() -> None:
    show = "{{ messages[0].content is string }}"
    assert render(PARTS, show, chat_template_content_format="openai") == "False"
    assert render(PARTS, show, chat_template_content_format="string") == "True"
    assert render([USER], EITHER_TEMPLATES[0], chat_template_content_format="openai") == "hi|"
    assert render(PARTS, EITHER_TEMPLATES[0], chat_template_content_format="string") == "a\nb\nc!"
    with pytest.raises(TacoValidationError, match='"auto", "string" or "openai"'):
        ChatOptions(chat_template_content_format="html")


def test_parts_keep_their_type_where_the_template_knows_it() -> None:
    thought = [{"role": "user", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}]
    plain = "{% for p in messages[0].content %}{{ p.type }}={{ p.text }}|{% endfor %}"
    assert render(thought, plain) == "text=hm|text=a|"
    knows = "{% for p in messages[0].content %}{{ p.thinking if p.type == 'thinking' else p.text }}|{% endfor %}"
    assert render(thought, knows) == "hm|a|"


def test_kinds_of_text_parts() -> None:
    assert content_texts([{"type": "refusal", "refusal": "no"}, {"type": "thinking", "thinking": "hm"}]) == ["no", "hm"]
    assert content_texts([{"text": "typeless"}]) == ["typeless"]
    assert content_texts(None) == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x"}},
        {"image_url": "x"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "video_url"},
    ],
)
def test_media_are_refused_by_name(part: dict[str, Any]) -> None:
    kind = part.get("type", "image_url")
    with pytest.raises(UnsupportedFeatureError, match=f"type '{kind}' are not supported"):
        render([{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "must be a list of messages"),
        ({"role": "user"}, "must be a list of messages"),
        ([], "at least one message"),
        (["hi"], 'needs|must be a dict with a "role"'),
        ([{"content": "x"}], '"role"'),
        ([{"role": "user", "content": 3}], "content of a message must be"),
        ([{"role": "user", "content": [3]}], "part of a message's content"),
        ([{"role": "user", "content": [{"type": "hologram"}]}], "Unknown part type: 'hologram'"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], r"Unknown part type: \['text'\]"),
        ([{"role": "assistant", "tool_calls": 5}], "tool_calls of a message must be a list, got 5"),
        ([{"role": "assistant", "tool_calls": {"id": "x"}}], "tool_calls of a message must be a list"),
        ([{"role": "user", "content": [{"type": "text"}]}], 'needs a string under "text"'),
    ],
)
def test_malformed_conversations_are_errors(messages: Any, message: str) -> None:
    with pytest.raises(TacoValidationError, match=message):
        render(messages)


def test_an_unknown_part_is_not_implemented() -> None:
    with pytest.raises(NotImplementedError, match="Unknown part type: 'smell'"):
        content_texts([{"type": "smell"}])


def test_errors_of_a_template_are_reported_with_their_text() -> None:
    with pytest.raises(TacoValidationError, match="TemplateError: roles must alternate"):
        render([USER], "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(jinja2.TemplateError, match="UndefinedError") as caught:
        render([USER], "{{ no.such }}")
    assert isinstance(caught.value, TacoValidationError)
    assert caught.value.message == str(caught.value) and caught.value.parameter == "messages"
    with pytest.raises(TacoValidationError, match="SecurityError"):
        render([USER], "{{ messages.__class__.__base__.__subclasses__() }}")


def test_messages_of_the_caller_are_not_changed() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    before = copy.deepcopy(messages)
    render(messages)
    assert messages == before


def tool_call(arguments: object, **message: Any) -> list[dict[str, Any]]:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    return [{"role": "assistant", "tool_calls": calls, **message}]


def test_arguments_of_tool_calls_are_decoded() -> None:
    show = "{{ messages[0].tool_calls[0].function.arguments.x }}|{{ messages[0].content }}|"
    assert render(tool_call('{"x": 7}'), show) == "7||"
    assert render(tool_call({"x": 7}), show) == "7||"
    assert render(tool_call(""), show) == "||"


def test_malformed_arguments_are_an_error_in_06_and_empty_in_033(caplog: pytest.LogCaptureFixture) -> None:
    for arguments in ("{x", "[" * 100_000):
        with pytest.raises(TacoValidationError, match="not valid JSON"):
            render(tool_call(arguments))
    show = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render(tool_call("{x"), show, behaviour=V0_33) == "{}"
    assert "not valid JSON" in caplog.text and "{x" in caplog.text and "'assistant'" in caplog.text


CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ SHOWN }}{% endfor %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "shown",
    [
        "c.function.arguments",
        "'' + c.function.arguments",
        "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
    ],
)
def test_arguments_stay_text_where_the_template_reads_text(shown: str) -> None:
    assert render(tool_call('{"x":  7}'), CALLS.replace("SHOWN", shown)) == '{"x":  7}'
    assert render(tool_call('{"x":  7}'), CALLS.replace("SHOWN", "c.function | tojson")) == (
        '{"name": "f", "arguments": {"x": 7}}'
    )


def test_content_that_is_missing_is_empty_or_none_where_the_template_insists() -> None:
    absent = "{% for m in messages %}{{ 'content' in m }}{% endfor %}"
    concatenated = "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}"
    reasons = "{% for m in messages %}{{ m.reasoning_content if m.reasoning_content is not none }}"
    reasons += "{{ '<' + m.content + '>' }}{% endfor %}"
    listed = "{% for m in messages %}{{ m.content | length + 0 * m['content'].count('x') }}{% for p in m.content %}"
    listed += "{{ p.text }}{% endfor %}{% endfor %}"
    tested = "{% for m in messages %}{% if m['content'] is none %}calls{% else %}{{ '<' + m['content'] + '>' }}"
    tested += "{% endif %}{% endfor %}"
    for messages in (tool_call({}), tool_call({}, content=None)):
        assert render(messages, absent) == "False"
        assert render(messages, concatenated) == render(messages, reasons) == "<>"
        assert render(messages, listed) == "0"
        assert render(messages, tested) == "calls"
        assert render([*messages, USER], tested, continue_final_message=True, add_generation_prompt=False) == "calls<hi"


def test_control_tokens_are_not_silently_left_in() -> None:
    with pytest.raises(UnsupportedFeatureError, match="sanitize_control_tokens"):
        render([USER], chat_template_kwargs={"sanitize_control_tokens": True})
    assert render([USER], chat_template_kwargs={"sanitize_control_tokens": False}) == "<s><|user|>hi</s><|assistant|>"


def test_developer_speaks_as_system_in_033_where_the_template_has_no_developer() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert render(messages, "{{ messages[0].role }}", behaviour=V0_33) == "system"
    assert render(messages, "{# developer #}{{ messages[0].role }}", behaviour=V0_33) == "developer"
    assert render(messages, "{{ messages[0].role }}") == "developer"


def test_first_element_tells_one_conversation_from_many() -> None:
    assert split_conversations([USER, USER]) == [[USER, USER]]
    assert split_conversations([[USER], [USER]]) == [[USER], [USER]]
    assert split_conversations(([USER],)) == [[USER]]
    assert split_conversations([]) == []
    for wrong in ("hi", USER, 3):
        with pytest.raises(TacoValidationError, match="messages must be a list"):
            split_conversations(wrong)


def test_messages_may_be_objects() -> None:
    class Message:
        def model_dump(self, exclude_none: bool) -> dict[str, Any]:
            return {"role": "user", "content": "hi"}

    assert split_conversations([Message()]) != []
    assert render([Message()]) == "<s><|user|>hi</s><|assistant|>"
