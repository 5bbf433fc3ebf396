"""Tools that a model may call: the schema of a text that is such a call, and the calls that a text has."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taco.errors import TacoValidationError
from taco.json_schema import close_objects, map_schemas, move_references

_HERMES = "<tool_call>"
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_CALL = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\](\w+))?(?:\[ARGS\])?\s*(?=\{)")
# Marks that stand before calls, and others that may stand after them.
_OPENING = re.compile(r"\A(?:<\|python_tag\|>|<\|python_start\|>|<\|tool_call_start\|>)\s*")
_CLOSING = re.compile(r"\s*(?:<\|python_end\|>|<\|tool_call_end\|>|<\|eom_id\|>|<\|eot_id\|>)")
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:')
_PYTHON_CALL = re.compile(r"\[\s*([A-Za-z_][\w.]*)\((\s*\w+\s*=)?")
_DECODER = json.JSONDecoder(strict=False)  # models write line breaks in strings as they are


class ToolCallError(TacoValidationError):
    """A text has the beginning of a tool call that cannot be read, or calls what is no tool."""


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool.

    Args:
        name: of the tool.
        arguments: by name.
        id: that the model gave it; None where its format has none.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None

    def as_message_part(self) -> dict[str, Any]:
        """The call as it stands in the list `tool_calls` of an assistant's message."""
        call = {"type": "function", "function": {"name": self.name, "arguments": json.dumps(self.arguments)}}
        return call if self.id is None else {"id": self.id, **call}


# What a tool is


def tool_schema(tool: Any) -> dict[str, Any]:
    """The description of a tool in OpenAI's form.

    Args:
        tool: a dict in that form, or just its "function"; or a function with type hints and a docstring.

    Raises:
        TacoValidationError: it is something else, or the function lacks a hint or a description.
    """
    if callable(tool):
        from transformers.utils import get_json_schema

        try:
            schema: dict[str, Any] = get_json_schema(tool)
        except Exception as error:  # of several kinds
            raise _bad_tool(f"{getattr(tool, '__name__', tool)}: {error}") from error
        return schema
    if isinstance(tool, Mapping):
        if isinstance(tool.get("function"), Mapping):
            return dict(tool)
        if "name" in tool:
            return {"type": "function", "function": dict(tool)}
    raise _bad_tool(f'A tool is a function, or a dict with a "function" that has a "name", got {tool!r:.200}')


def parameters_of_tools(tools: Iterable[Any]) -> dict[str, Mapping[str, Any]]:
    """The schema of the arguments of each tool, by name.

    Raises:
        TacoValidationError: see `tool_schema`; or two tools have one name, or the schema is not that of an object.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool_schema(tool)["function"]
        name = function.get("name")
        parameters = function.get("parameters") or {"properties": {}}
        if not isinstance(name, str) or not name:
            raise _bad_tool(f'The "name" of a tool must be a text, got {name!r:.200}')
        if name in found:
            raise _bad_tool(f"Two tools have the name {name!r}")
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise _bad_tool(
                f'The "parameters" of {name} must be a JSON schema of type "object", got {parameters!r:.200}'
            )
        try:
            found[name] = {"type": "object", **map_schemas(parameters, _without_nullable)}
        except RecursionError:
            raise _bad_tool(f'The "parameters" of {name} are nested too deeply') from None
    return found


def _without_nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """The same without what OpenAPI, and transformers for `Optional`, say of null, which no JSON schema means by it."""
    if isinstance(schema.get("nullable"), bool):
        del schema["nullable"]
    return schema


def _bad_tool(message: str) -> TacoValidationError:
    return TacoValidationError(f"{message}.", parameter="tools")


def chosen_tool(tool_choice: object) -> str | None:
    """The name of the function that a `tool_choice` demands; None for those that demand none in particular.

    Raises:
        TacoValidationError: it is none of the forms of a `tool_choice`.
    """
    if tool_choice in (None, "none", "auto", "required"):
        return None
    if isinstance(tool_choice, Mapping) and isinstance(tool_choice.get("function"), Mapping):
        name = tool_choice["function"].get("name")
        if isinstance(name, str) and tool_choice.get("type", "function") == "function":
            return name
    raise TacoValidationError(
        'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}, got '
        f"{tool_choice!r:.200}.",
        parameter="tool_choice",
        value=tool_choice,
    )


# The text that is a call


def tool_choice_schema(tools: Sequence[Any] | None, tool_choice: object) -> dict[str, Any] | None:
    """The JSON schema of the text that a `tool_choice` demands.

    "required": a list of one call or more, each `{"name": ..., "parameters": {...}}`. A named function: its arguments
    alone, as an object.

    Args:
        tools: as for `LLM.chat`.
        tool_choice: see there.

    Returns:
        None if any text will do ("auto", "none").

    Raises:
        TacoValidationError: a tool or the choice is malformed, or what it demands is not among the tools.
    """
    name = chosen_tool(tool_choice)
    if name is None and tool_choice != "required":
        return None
    if not tools:
        raise TacoValidationError(
            f"When using tool_choice, tools must be set: {tool_choice!r} demands a call of one.",
            parameter="tool_choice",
        )
    parameters = parameters_of_tools(tools)
    if name is None:
        calls = [_call_schema(name, schema, f"/items/anyOf/{i}") for i, (name, schema) in enumerate(parameters.items())]
        return {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if name not in parameters:
        raise TacoValidationError(
            f"tool_choice: Tool {name!r} has not been passed in tools; there are {list(parameters)}.",
            parameter="tool_choice",
            value=name,
        )
    return dict(parameters[name])


def _call_schema(name: str, parameters: Mapping[str, Any], place: str) -> dict[str, Any]:
    own = {key: value for key, value in close_objects(parameters).items() if key not in ("$schema", "$id")}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": move_references(own, f"{place}/properties/parameters")},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


# The calls in a text


def parse_tool_calls(text: str, tools: Sequence[Any] | None = None, tool_choice: object = None) -> list[ToolCall]:
    """The tool calls that a model has written.

    These forms are known: what `tool_choice` makes of an output; a JSON list of calls, or one call (Llama 3), each with
    "name" and "arguments" or "parameters"; `<tool_call>{...}</tool_call>` between other text (Hermes, Qwen);
    `[TOOL_CALLS] [...]` and `[TOOL_CALLS]name{...}` (Mistral); `[name(key="value"), ...]` (Llama 3.2 and 4, LFM2). What
    stands before `</think>` is left out.

    Args:
        text: of an output.
        tools: as for `LLM.chat`; their names are the ones that may be called. None for any.
        tool_choice: that the output was generated with; needed where it names a function.

    Returns:
        The calls in their order; none for a text without calls.

    Raises:
        ToolCallError: a call is malformed or cut off (as when `finish_reason` is "length"), or of something else than
            `tools`.
        TacoValidationError: `tools` or `tool_choice` are malformed.
    """
    parameters = None if tools is None else parameters_of_tools(tools)
    name = chosen_tool(tool_choice)
    if name is not None:
        calls = [ToolCall(name, _arguments(name, _one_json(text, f"the arguments of {name}")))]
    else:
        calls = _calls_of_json(text.strip(), parameters)
        calls = calls or list(_calls_in(text.rpartition("</think>")[2].strip(), parameters))
        if tool_choice == "required" and not calls:
            raise ToolCallError(f"The text has no tool call, or the beginning of one: {text!r:.200}.", value=text)
    for call in calls:
        if parameters is not None and call.name not in parameters:
            raise ToolCallError(f"The text calls {call.name!r}, but the tools are {list(parameters)}.", value=text)
    return calls


def _calls_of_json(text: str, parameters: Mapping[str, Any] | None) -> list[ToolCall]:
    """The calls of a text that is nothing but JSON, whose arguments may look like marks of other forms."""
    try:
        return _bare_calls(text, False, parameters)
    except ToolCallError:
        return []  # the other forms know better what is wrong


def _calls_in(text: str, parameters: Mapping[str, Mapping[str, Any]] | None) -> Iterator[ToolCall]:
    if _HERMES in text:
        _, mark, content = text.partition(_HERMES)
        while mark:
            content = content.strip()
            yield from _json_calls(_one_json(content, f"what follows {_HERMES}"))
            _, mark, content = content[_DECODER.raw_decode(content)[1] :].partition(_HERMES)
        return
    if _MISTRAL in text:
        for content in text.split(_MISTRAL)[1:]:
            yield from _mistral_calls(content)
        return
    body = _OPENING.sub("", text)
    is_marked = body != text
    body = _CLOSING.sub("", body).strip()
    if match := _PYTHON_CALL.match(body):
        is_call = is_marked or match[1] in (parameters or ()) or match[2] is not None
        yield from _python_calls(body, is_call, parameters)
    elif body[:1] in ("[", "{"):
        yield from _bare_calls(body, is_marked, parameters)
    elif is_marked:
        raise ToolCallError(f"What follows the mark of a tool call is none: {body!r:.200}.", value=text)


def _one_json(text: str, what: str) -> Any:
    try:
        value, _ = _DECODER.raw_decode(text.strip())
    except (ValueError, RecursionError) as error:
        raise ToolCallError(f"In a tool call, {what} is not valid JSON or is cut off: {error}.", value=text) from None
    return value


def _bare_calls(text: str, is_marked: bool, parameters: Mapping[str, Any] | None) -> list[ToolCall]:
    """Calls of a text that is nothing but JSON; none if it is another JSON or another text."""
    values: list[Any] = []
    rest = text
    try:
        while rest:
            value, end = _DECODER.raw_decode(rest)
            values += value if isinstance(value, list) else [value]
            rest = rest[end:].lstrip("; \n\r\t")  # Llama puts a semicolon between calls
    except (ValueError, RecursionError) as error:
        name = _NAME.search(text)
        is_call = name is not None and (name[1] in (parameters or ()) or _ARGUMENTS.search(text) is not None)
        if is_marked or is_call:
            raise ToolCallError(f"A tool call is not valid JSON or is cut off: {error}.", value=text) from None
        return []
    calls = [call for call in map(_json_call, values) if call is not None]
    if len(calls) == len(values):
        return calls
    if is_marked:
        raise _no_call(text)
    return []


def _json_calls(value: Any) -> list[ToolCall]:
    calls = []
    for one in value if isinstance(value, list) else [value]:
        call = _json_call({"arguments": {}, **one} if isinstance(one, dict) and "parameters" not in one else one)
        if call is None:
            raise _no_call(one)
        calls.append(call)
    return calls


def _no_call(value: object) -> ToolCallError:
    return ToolCallError(f'A tool call must be an object with "name" and "arguments", got {value!r:.200}.', value=value)


def _json_call(value: Any) -> ToolCall | None:
    """A call from its JSON; None if that is something else."""
    if not isinstance(value, dict):
        return None
    function = value["function"] if isinstance(value.get("function"), dict) else value
    name = function.get("name")
    given = [function[key] for key in ("arguments", "parameters") if key in function]
    if not isinstance(name, str) or not given:
        return None
    call_id = value.get("id")
    return ToolCall(name, _arguments(name, given[0]), call_id if isinstance(call_id, str) else None)


def _arguments(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):  # OpenAI's form has JSON text
        value = _one_json(value, f"the arguments of {name}") if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ToolCallError(f"The arguments of {name} must be a JSON object, got {value!r:.200}.", value=value)
    return value


def _mistral_calls(content: str) -> Iterator[ToolCall]:
    if content.lstrip()[:1] in ("[", "{"):
        yield from _json_calls(_one_json(content, f"what follows {_MISTRAL}"))
        return
    match = _MISTRAL_CALL.match(content)
    if match is None:
        raise ToolCallError(f"What follows {_MISTRAL} is no tool call or is cut off: {content!r:.200}.", value=content)
    while match is not None:
        name, call_id = match.groups()
        rest = content[match.end() :]
        yield ToolCall(name, _arguments(name, _one_json(rest, f"the arguments of {name}")), call_id)
        content = rest[_DECODER.raw_decode(rest)[1] :]
        match = _MISTRAL_CALL.match(content)


class _JsonNames(ast.NodeTransformer):
    """JSON's names of constants, which models write in Python too."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        names = {"true": True, "false": False, "null": None}
        return ast.Constant(names[node.id]) if node.id in names else node


def _python_calls(text: str, is_call: bool, parameters: Mapping[str, Mapping[str, Any]] | None) -> Iterator[ToolCall]:
    try:
        listed = ast.parse(text, mode="eval").body
        nodes = listed.elts if isinstance(listed, ast.List) else []
        if not nodes or not all(isinstance(node, ast.Call) for node in nodes):
            raise ValueError("it is not a list of calls")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if is_call:
            raise ToolCallError(f"A list of tool calls is malformed or cut off: {error}.", value=text) from None
        return
    for node in nodes:
        assert isinstance(node, ast.Call)
        name = ast.unparse(node.func)
        positions = list((parameters or {}).get(name, {}).get("properties", {}))
        if len(node.args) > len(positions) or any(word.arg is None for word in node.keywords):
            raise ToolCallError(f"The arguments of {name} need names: {ast.unparse(node)!r:.200}.", value=text)
        given = [*zip(positions, node.args, strict=False), *((word.arg, word.value) for word in node.keywords)]
        try:
            arguments = {key: ast.literal_eval(_JsonNames().visit(value)) for key, value in given}
            json.dumps(arguments, allow_nan=False)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise ToolCallError(
                f"The arguments of {name} must be constants, got {ast.unparse(node)!r:.200}.", value=text
            ) from None
        yield ToolCall(name, arguments)
