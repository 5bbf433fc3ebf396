"""Schemas of tool calls, and calls read from texts."""

from __future__ import annotations

import json
from typing import Any, Literal, Optional

import jsonschema
import pytest

import taco
from taco.config import GuidedDecodingConfig
from taco.errors import TacoValidationError
from taco.guided.request import to_spec
from taco.guided.schema import read_schema
from taco.sampling_params import StructuredOutputsParams
from taco.tool_calls import ToolCall, ToolCallError, parse_tool_calls, tool_choice_schema, tool_schema


def get_weather(city: str, days: int = 3) -> str:
    """The weather forecast.

    Args:
        city: Name of the city.
        days: How many days.
    """
    return f"{city}: {days}"


TREE = {
    "type": "object",
    "properties": {"left": {"$ref": "#/$defs/Tree"}, "size": {"type": "integer"}},
    "$defs": {"Tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/Tree"}}}},
    "required": ["size"],
}
PLANT: dict[str, Any] = {"type": "function", "function": {"name": "plant", "description": "...", "parameters": TREE}}
NOW: dict[str, Any] = {"name": "now"}
TOOLS = [get_weather, PLANT, NOW]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def matches(value: Any, schema: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def test_names_are_exported() -> None:
    assert taco.parse_tool_calls is parse_tool_calls and taco.ToolCall is ToolCall


# Tools


def test_functions_and_bare_dicts_are_described_in_openais_form() -> None:
    function = tool_schema(get_weather)["function"]
    assert function["name"] == "get_weather" and function["parameters"]["required"] == ["city"]
    assert tool_schema(PLANT) == PLANT
    assert tool_schema(NOW) == {"type": "function", "function": {"name": "now"}}


def undescribed(city: str) -> None: ...


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (["get_weather"], "A tool is a function, or a dict"),
        ([{"type": "function"}], "A tool is a function, or a dict"),
        ([{"name": 5}], 'The "name" of a tool must be a text'),
        ([NOW, {"type": "function", "function": {"name": "now"}}], "Two tools have the name 'now'"),
        (
            [{"name": "f", "parameters": {"type": "array"}}],
            'The "parameters" of f must be a JSON schema of type "object"',
        ),
        ([{"name": "f", "parameters": [1]}], 'The "parameters" of f must be a JSON schema of type "object"'),
        ([undescribed], "undescribed: "),
    ],
)
def test_what_is_no_tool_is_an_error(tools: list[Any], message: str) -> None:
    with pytest.raises(TacoValidationError, match=message) as caught:
        tool_choice_schema(tools, "required")
    assert caught.value.parameter == "tools"


# tool_choice


@pytest.mark.parametrize("tool_choice", [None, "auto", "none"])
def test_choices_that_demand_no_call_leave_the_text_free(tool_choice: Any) -> None:
    assert tool_choice_schema(TOOLS, tool_choice) is None
    assert tool_choice_schema(None, tool_choice) is None


@pytest.mark.parametrize(
    ("calls", "valid"),
    [
        ([{"name": "get_weather", "parameters": {"city": "Paris"}}], True),
        ([{"name": "now", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "", "days": 1}}], True),
        ([{"name": "plant", "parameters": {"size": 1, "left": {"left": {"left": {}}}}}], True),
        ([], False),
        ({"name": "now", "parameters": {}}, False),
        ([{"name": "now"}], False),
        ([{"name": "later", "parameters": {}}], False),
        ([{"name": "now", "parameters": {"city": "Paris"}}], False),
        ([{"name": "now", "parameters": {}, "why": 1}], False),
        ([{"name": "get_weather", "parameters": {}}], False),
        ([{"name": "get_weather", "parameters": {"city": "Paris", "hours": 1}}], False),
        ([{"name": "plant", "parameters": {"size": 1, "left": {"left": {"right": {}}}}}], False),
        ([{"name": "plant", "parameters": {"size": 1, "left": {"left": 1}}}], False),
    ],
)
def test_required_is_a_list_of_valid_calls(calls: Any, valid: bool) -> None:
    schema = tool_choice_schema(TOOLS, "required")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert matches(calls, schema) == valid


def test_two_tools_may_have_definitions_of_one_name() -> None:
    tools = [
        {"name": kind, "parameters": {"properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": kind}}}}
        for kind in ("string", "integer")
    ]
    schema = tool_choice_schema(tools, "required")
    for kind, other, value in (("string", "integer", "a"), ("integer", "string", 1)):
        assert matches([{"name": kind, "parameters": {"x": value}}], schema)
        assert not matches([{"name": other, "parameters": {"x": value}}], schema)


def test_optional_arguments_are_given_or_left_out() -> None:
    """For them transformers writes "nullable", which JSON schemas do not know."""

    def find(text: str, tags: Optional[list[str]] = None, mode: Optional[Literal["a", "b"]] = None) -> None:  # noqa: UP045
        """Find something.

        Args:
            text: Words.
            tags: Of it.
            mode: How.
        """

    schema = tool_choice_schema([find], named("find"))
    assert schema is not None and schema["required"] == ["text"] and "nullable" not in json.dumps(schema)
    assert "nullable" in json.dumps(tool_schema(find))  # what the model is told stays
    spec = to_spec(StructuredOutputsParams(json=schema), GuidedDecodingConfig())
    assert spec is not None
    assert "nullable" not in json.dumps(read_schema(spec.source).root)
    dictionary = {"name": "f", "parameters": {"properties": {"nullable": {"type": "string", "nullable": True}}}}
    found = tool_choice_schema([dictionary], named("f"))
    assert found is not None and found["properties"] == {"nullable": {"type": "string"}}


def test_a_named_function_has_its_arguments_alone() -> None:
    assert tool_choice_schema(TOOLS, named("plant")) == TREE
    schema = tool_choice_schema(TOOLS, named("now"))
    assert schema == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("tools", "tool_choice", "message"),
    [
        (None, "required", "When using tool_choice, tools must be set"),
        ([], named("now"), "When using tool_choice, tools must be set"),
        (
            TOOLS,
            named("later"),
            r"Tool 'later' has not been passed in tools; there are \['get_weather', 'plant', 'now'\]",
        ),
        (TOOLS, "now", "tool_choice must be"),
        (TOOLS, {"type": "function"}, "tool_choice must be"),
        (TOOLS, {"type": "mcp", "function": {"name": "now"}}, "tool_choice must be"),
        (TOOLS, True, "tool_choice must be"),
    ],
)
def test_wrong_choices_are_errors(tools: Any, tool_choice: Any, message: str) -> None:
    with pytest.raises(TacoValidationError, match=message) as caught:
        tool_choice_schema(tools, tool_choice)
    assert caught.value.parameter == "tool_choice"


# Reading calls

PARIS = ToolCall("get_weather", {"city": "Paris"})
WITH_CALLS = {
    "required": ('[{"name": "get_weather", "parameters": {"city": "Paris"}}]', [PARIS]),
    "list": ('\n[{"name": "now", "arguments": {}}, {"name": "now", "arguments": null}]', [ToolCall("now", {})] * 2),
    "openai": (
        '[{"id": "call_1", "type": "function", "function": '
        '{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}}]',
        [ToolCall("get_weather", {"city": "Paris"}, "call_1")],
    ),
    "llama": ('{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    "llama, several": (
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "now", "parameters": {}}<|eom_id|>',
        [PARIS, ToolCall("now", {})],
    ),
    "hermes": (
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>{"name": "now"}</tool_call> Done.',
        [PARIS, ToolCall("now", {})],
    ),
    "hermes, with marks as arguments": (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "<tool_call> </tool_call>"}}</tool_call>'
        '<tool_call>{"name": "now"}</tool_call>',
        [ToolCall("get_weather", {"city": "<tool_call> </tool_call>"}), ToolCall("now", {})],
    ),
    "list, with marks as arguments": (
        '[{"name": "get_weather", "parameters": {"city": "<tool_call> [TOOL_CALLS] </think>"}}]',
        [ToolCall("get_weather", {"city": "<tool_call> [TOOL_CALLS] </think>"})],
    ),
    "hermes, without its end": ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n', [PARIS]),
    "thoughts": ('<think><tool_call>?</think>{"name": "now", "parameters": {}}', [ToolCall("now", {})]),
    "mistral": (
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]',
        [ToolCall("get_weather", {"city": "Paris"}, "abcdefghi")],
    ),
    "mistral, newer": ('[TOOL_CALLS]get_weather{"city": "Paris"}now[ARGS]{}', [PARIS, ToolCall("now", {})]),
    "mistral, with marks": (
        '[TOOL_CALLS]get_weather[CALL_ID]x1[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}',
        [ToolCall("get_weather", {"city": "Paris"}, "x1"), ToolCall("now", {})],
    ),
    "python": (
        "[get_weather(city='Paris'), plant(size=-1, left={'left': [true, None, null]})]",
        [PARIS, ToolCall("plant", {"size": -1, "left": {"left": [True, None, None]}})],
    ),
    "python, in positions": ('<|tool_call_start|>[get_weather("Paris")]<|tool_call_end|>', [PARIS]),
    "line break in a string": (
        '{"name": "get_weather", "arguments": {"city": "A\nB"}}',
        [ToolCall("get_weather", {"city": "A\nB"})],
    ),
}


@pytest.mark.parametrize("form", WITH_CALLS)
def test_calls_are_read(form: str) -> None:
    text, calls = WITH_CALLS[form]
    assert parse_tool_calls(text, TOOLS) == calls
    if form != "python, in positions":
        assert parse_tool_calls(text) == calls


def test_the_arguments_of_a_named_function_are_read() -> None:
    assert parse_tool_calls('{"city": "Paris"}', TOOLS, named("get_weather")) == [PARIS]
    assert parse_tool_calls('{"name": "now", "arguments": {}}', None, named("f")) == [
        ToolCall("f", {"name": "now", "arguments": {}})
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris is sunny.",
        "[1] As the forecast says, ...",
        "[see(below)](http://example.com) for more",
        "[]",
        "[1, 2]",
        '{"city": "Paris"}',
        '{"name": "Bob"}',
        '[{"name": "Bob", "age": 5}, {"name": "Ann", "age"',
        "{not JSON",
        "I call get_weather(city='Paris').",
        "[get_weather]",
        "<think>[TOOL_CALLS]</think>Hello",
    ],
)
def test_other_texts_have_no_calls(text: str) -> None:
    assert parse_tool_calls(text, TOOLS) == parse_tool_calls(text) == []
    with pytest.raises(ToolCallError, match="no tool call"):
        parse_tool_calls(text, TOOLS, "required")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"name": "now", "parameters": {}}, {"name": "get_w', "cut off"),
        ('[{"name": "now", "par', "cut off"),
        ('<tool_call>\n{"name": "now", "argu', "what follows <tool_call> is not valid JSON or is cut off"),
        ("<tool_call>", "cut off"),
        ("<tool_call>[1]</tool_call>", "must be an object with"),
        ('<tool_call>{"name": "now", "arguments": [1]}</tool_call>', "arguments of now must be a JSON object"),
        ('{"name": "now", "arguments": "[1]"}', "arguments of now must be a JSON object"),
        ('{"name": "now", "arguments": "{"}', "arguments of now is not valid JSON"),
        ("[TOOL_CALLS] now", r"follows \[TOOL_CALLS\] is no tool call or is cut off"),
        ('[TOOL_CALLS]now{"a": ', "cut off"),
        ("<|python_tag|>print(1)", "follows the mark of a tool call is none"),
        ("<|python_tag|>{", "cut off"),
        ('<|python_tag|>{"a": 1}', "must be an object with"),
        ('{"name": "later", "arguments": {}}', "calls 'later', but the tools are"),
        ("[later(x=1)]", "calls 'later', but the tools are"),
        ("[now(", "malformed or cut off"),
        ("[now(), 1]", "malformed or cut off"),
        ("[get_weather(city=print(1))]", r"must be constants, got 'get_weather\(city=print\(1\)\)'"),
        ("[get_weather(city={1})]", "must be constants"),
        ("[get_weather(**{'city': 1})]", "arguments of get_weather need names"),
        ("[get_weather(1, 2, 3)]", "arguments of get_weather need names"),
    ],
)
def test_broken_calls_are_errors(text: str, message: str) -> None:
    with pytest.raises(ToolCallError, match=message):
        parse_tool_calls(text, TOOLS)


def test_the_arguments_of_a_named_function_must_be_whole() -> None:
    with pytest.raises(ToolCallError, match="cut off"):
        parse_tool_calls('{"city": "Pa', TOOLS, named("get_weather"))


def test_a_call_becomes_a_part_of_a_message() -> None:
    part = ToolCall("now", {"a": "ä"}, "x").as_message_part()
    assert part["id"] == "x" and part["type"] == "function" and part["function"]["name"] == "now"
    assert json.loads(part["function"]["arguments"]) == {"a": "ä"}
    assert "id" not in ToolCall("now", {}).as_message_part()
    assert parse_tool_calls(json.dumps([part])) == [ToolCall("now", {"a": "ä"}, "x")]
