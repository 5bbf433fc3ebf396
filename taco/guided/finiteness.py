"""Which JSON schemas are matched by values of finite size: recursion may leave none.

Schemas are those that `taco.guided.schema` writes: of the keywords of the standard they have a part.
"""

from __future__ import annotations

from typing import Any

JsonSchema = dict[str, Any] | bool


def finite_definitions(definitions: dict[str, JsonSchema]) -> set[str]:
    """The definitions that some value of finite size matches, as far as recursion decides."""
    finite: set[str] = set()
    waiting = list(definitions)
    while True:
        left = []
        for name in reversed(waiting):  # what is referred to comes later
            if is_finite(definitions[name], finite):
                finite.add(name)
            else:
                left.append(name)
        if len(left) == len(waiting):
            return finite
        waiting = left[::-1]


def is_finite(schema: JsonSchema, finite: set[str]) -> bool:
    """Whether some value of finite size matches, given the definitions of which that is known."""
    if isinstance(schema, bool):
        return schema
    if "enum" in schema:
        return True
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in finite:
        return False
    if not all(is_finite(part, finite) for part in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(is_finite(option, finite) for option in schema["anyOf"]):
        return False
    if "type" not in schema:
        return True
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return any(
        _has_finite_object(schema, finite)
        if name == "object"
        else _has_finite_array(schema, finite)
        if name == "array"
        else True
        for name in types
    )


def _has_finite_object(schema: dict[str, Any], finite: set[str]) -> bool:
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", True) if "patternProperties" not in schema else True
    return all(is_finite(properties.get(name, others), finite) for name in schema.get("required", ()))


def _has_finite_array(schema: dict[str, Any], finite: set[str]) -> bool:
    prefix = schema.get("prefixItems", [])
    least = schema.get("minItems", 0)
    needed = [*prefix[:least], *([schema.get("items", True)] if least > len(prefix) else [])]
    return all(is_finite(item, finite) for item in needed)


def without_endless(schema: JsonSchema, finite: set[str]) -> JsonSchema:
    """The same values of finite size; nothing refers to definitions that have none."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in finite:
        return False
    changed = dict(schema)
    for keyword in ("anyOf", "allOf", "prefixItems"):
        if keyword in schema:
            changed[keyword] = [without_endless(part, finite) for part in schema[keyword]]
    if "anyOf" in changed:
        changed["anyOf"] = [option for option in changed["anyOf"] if option is not False] or [False]
    for keyword in ("properties", "patternProperties"):
        if keyword in schema:
            changed[keyword] = {name: without_endless(part, finite) for name, part in schema[keyword].items()}
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            changed[keyword] = without_endless(schema[keyword], finite)
    return changed
