from __future__ import annotations

import copy
from typing import Any

import pytest

from taco.engine.input_processor import TokenizeOptions
from taco.entrypoints.chat import ChatOptions, ChatRenderer, content_texts, detect_content_format, split_conversations
from taco.errors import TacoValidationError, UnsupportedFeatureError
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level_tokenizer

SHOW = "{{ messages }}|{{ tools }}|{{ documents }}|{{ color }}"
USER = {"role": "user", "content": "hi"}


def tokenizer_with(template: Any) -> Any:
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def render(messages: Any, template: str = CHAT_TEMPLATE, default: str | None = None, **options: Any) -> str:
    return ChatRenderer(tokenizer_with(template), ChatOptions(**options), default).render(messages)


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
    assert ChatRenderer(tokenizer, ChatOptions()).render([USER]) == "plain"
    assert ChatRenderer(tokenizer, ChatOptions(chat_template="other")).render([USER]) == "other"
    assert ChatRenderer(tokenizer, ChatOptions(tools=[{"type": "function"}])).render([USER]) == "tools"


def test_without_a_template_the_error_says_what_to_do() -> None:
    with pytest.raises(TacoValidationError, match="default chat template is no longer allowed.*Pass chat_template"):
        ChatRenderer(tokenizer_with(None), ChatOptions())


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
    options = ChatOptions(chat_template_kwargs={"add_generation_prompt": False, "tokenize": True, "return_dict": True})
    text = ChatRenderer(tokenizer_with(CHAT_TEMPLATE), options).render([USER])
    assert text.endswith("<|assistant|>")


# Content


OPENAI_TEMPLATES = [
    "{% for m in messages %}{% for part in m['content'] %}{{ part.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set c = m.content %}{% for part in c | list %}{{ part.text }}{% endfor %}{% endfor %}",
    "{% macro show(body) %}{% for p in body %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "{% for m in messages %}{% set c = m.content if m.content else [] %}{% for p in c[1:] %}{{ p }}{% endfor %}"
    "{% endfor %}",
    "{% for m in messages %}{% generation %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endgeneration %}"
    "{% endfor %}",
]
STRING_TEMPLATES = [
    CHAT_TEMPLATE,
    "{% for m in messages %}{% for line in m.content.split('x') %}{{ line }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set content = m.role %}{% for c in content %}{{ c }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "{% this is no template",
]


def test_content_format_is_read_from_the_template() -> None:
    assert [detect_content_format(template) for template in OPENAI_TEMPLATES] == ["openai"] * len(OPENAI_TEMPLATES)
    assert [detect_content_format(template) for template in STRING_TEMPLATES] == ["string"] * len(STRING_TEMPLATES)


def test_content_takes_the_form_that_the_template_reads() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]}]
    assert render(parts) == "<s><|user|>a\nb\nc</s><|assistant|>"
    assert render(parts, OPENAI_TEMPLATES[0]) == "abc"
    assert render([USER], OPENAI_TEMPLATES[0]) == "hi"
    show = "{{ messages[0].content is string }}"
    assert render(parts, show, chat_template_content_format="openai") == "False"
    assert render(parts, show, chat_template_content_format="string") == "True"
    with pytest.raises(TacoValidationError, match='"auto", "string" or "openai"'):
        ChatOptions(chat_template_content_format="html")


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
        ([{"role": "user", "content": [{"type": "text"}]}], 'needs a string under "text"'),
    ],
)
def test_malformed_conversations_are_errors(messages: Any, message: str) -> None:
    with pytest.raises(TacoValidationError, match=message):
        render(messages)


def test_errors_of_a_template_are_reported_with_their_text() -> None:
    with pytest.raises(TacoValidationError, match="TemplateError: roles must alternate"):
        render([USER], "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TacoValidationError, match="SecurityError"):
        render([USER], "{{ messages.__class__.__base__.__subclasses__() }}")


def test_messages_of_the_caller_are_not_changed() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    before = copy.deepcopy(messages)
    render(messages)
    assert messages == before


def test_arguments_of_tool_calls_are_decoded() -> None:
    def call(arguments: object) -> list[dict[str, Any]]:
        return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    show = "{{ messages[0].tool_calls[0].function.arguments.x }}|{{ messages[0].content }}|"
    assert render(call('{"x": 7}'), show) == "7||"
    assert render(call({"x": 7}), show) == "7||"
    assert render(call(""), show) == "||"
    with pytest.raises(TacoValidationError, match="not valid JSON"):
        render(call("{x"))


def test_developer_speaks_as_system_where_the_template_has_no_developer() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert render(messages, "{{ messages[0].role }}") == "system"
    assert render(messages, "{# developer #}{{ messages[0].role }}") == "developer"


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
