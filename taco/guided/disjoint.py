"""Whether two JSON schemas can be told apart: no value matches both.

Where the options of `oneOf` are, it says what `anyOf` says, which every library enforces.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_TYPES = ("null", "boolean", "number", "string", "array", "object")
_MAX_DEPTH = 8

Schema = dict[str, Any] | bool


def are_disjoint(
    options: Sequence[Schema], resolve: Callable[[str], Schema], given: Mapping[int, Mapping[str, Any]]
) -> bool:
    """Whether no value matches two of the schemas, as far as types, values, bounds and named properties tell.

    Args:
        options: schemas as `taco.guided.schema` writes them.
        resolve: the schema that a reference refers to.
        given: keywords as they were given, None for none, by the id of the schema that has stricter ones.
    """
    check = _Check(resolve, given)
    return all(check.disjoint(a, b, 0) for i, a in enumerate(options) for b in options[i + 1 :])


class _Check:
    def __init__(self, resolve: Callable[[str], Schema], given: Mapping[int, Mapping[str, Any]]) -> None:
        self._resolve = resolve
        self._given = given

    def disjoint(self, a: Schema, b: Schema, depth: int) -> bool:
        """Whether no value matches both; False where that is not plain to see."""
        if a is False or b is False:
            return True
        if a is True or b is True or depth > _MAX_DEPTH:
            return False
        a, b = self._as_given(a), self._as_given(b)
        return self._splits(a, b, depth + 1) or self._splits(b, a, depth + 1) or self._parts_differ(a, b, depth + 1)

    def _as_given(self, schema: dict[str, Any]) -> dict[str, Any]:
        changed = {**schema, **self._given.get(id(schema), {})}
        return {name: value for name, value in changed.items() if value is not None}

    def _splits(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        """Whether one of the schemas that hold beside `a`, or each of those of which some holds, is disjoint from b."""
        if "$ref" in a and self.disjoint(self._resolve(a["$ref"]), b, depth):
            return True
        if any(self.disjoint(part, b, depth) for part in a.get("allOf", ())):
            return True
        return any(
            keyword in a and all(self.disjoint(option, b, depth) for option in a[keyword])
            for keyword in ("anyOf", "oneOf")
        )

    def _parts_differ(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        if "enum" in a and "enum" in b:
            return _keys(a["enum"]).isdisjoint(_keys(b["enum"]))
        for name in _types(a) & _types(b):
            if not _CHECKS[name](self, a, b, depth):
                return False
        return True

    def _same(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        return False

    def _numbers(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        (least_a, most_a), (least_b, most_b) = _bounds(a), _bounds(b)
        return most_a < least_b or most_b < least_a

    def _strings(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        return _counts_differ(a, b, "minLength", "maxLength")

    def _arrays(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        if _counts_differ(a, b, "minItems", "maxItems"):
            return True
        # Items that both must have.
        sure = min(32, max(a.get("minItems", 0), b.get("minItems", 0)))
        return any(self.disjoint(_item(a, index), _item(b, index), depth) for index in range(sure))

    def _objects(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        # A property that one must have is one that the other must allow.
        names = dict.fromkeys((*a.get("required", ()), *b.get("required", ())))
        return any(self.disjoint(_property(a, name), _property(b, name), depth) for name in names)


_CHECKS: dict[str, Callable[[_Check, dict[str, Any], dict[str, Any], int], bool]] = {
    "null": _Check._same,
    "boolean": _Check._same,
    "number": _Check._numbers,
    "string": _Check._strings,
    "array": _Check._arrays,
    "object": _Check._objects,
}


def _types(schema: dict[str, Any]) -> set[str]:
    if "enum" in schema:
        return {_type_of(value) for value in schema["enum"]}
    types = schema.get("type", _TYPES)
    types = (types,) if isinstance(types, str) else types
    return {"number" if name == "integer" else name for name in types}


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    for python_type, name in ((bool, "boolean"), ((int, float), "number"), (str, "string"), (list, "array")):
        if isinstance(value, python_type):
            return name
    return "object"


def _keys(values: Sequence[Any]) -> set[str]:
    """One string for values that JSON schemas take for equal."""
    return {json.dumps(_plain(value), sort_keys=True) for value in values}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _bounds(schema: dict[str, Any]) -> tuple[float, float]:
    """The least and the largest number."""
    if "enum" in schema:
        numbers = [value for value in schema["enum"] if _type_of(value) == "number"]
        return min(numbers), max(numbers)
    least: list[float] = [schema.get("minimum", -math.inf)]
    most: list[float] = [schema.get("maximum", math.inf)]
    if "exclusiveMinimum" in schema:
        least.append(_beyond(schema["exclusiveMinimum"], math.inf))
    if "exclusiveMaximum" in schema:
        most.append(_beyond(schema["exclusiveMaximum"], -math.inf))
    return max(least), min(most)


def _beyond(bound: float, towards: float) -> float:
    """The next double; integers may be larger than any."""
    return math.nextafter(min(max(bound, -sys.float_info.max), sys.float_info.max), towards)


def _counts_differ(a: dict[str, Any], b: dict[str, Any], least: str, most: str) -> bool:
    return a.get(least, 0) > b.get(most, math.inf) or b.get(least, 0) > a.get(most, math.inf)


def _item(schema: dict[str, Any], index: int) -> Schema:
    prefix = schema.get("prefixItems", ())
    item: Schema = prefix[index] if index < len(prefix) else schema.get("items", True)
    return item


def _property(schema: dict[str, Any], name: str) -> Schema:
    """A schema that the property must match; there may be more."""
    if name in schema.get("properties", ()):
        value: Schema = schema["properties"][name]
        return value
    return True if "patternProperties" in schema else schema.get("additionalProperties", True)
