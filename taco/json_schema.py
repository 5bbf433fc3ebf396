"""Changes of JSON schemas that leave their meaning, or make it narrower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Keywords by what their values are; those of all others are schemas, lists of schemas, or neither.
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA = ("const", "enum", "default", "examples")
SCALARS = (str, int, float, type(None))  # told first: whether one is a Mapping takes long to find out
# With these an object has to match several schemas at once, or must not match one: each of them has to stay as it is.
_COMBINING = frozenset(
    (
        *("allOf", "oneOf", "not", "if", "contains", "dependentSchemas", "dependencies"),
        *("unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
    )
)
# So it has to where one of the first stands beside one of the second.
_REFERRING = frozenset(("anyOf", "$ref"))
_OF_OBJECTS = frozenset(
    (
        *("properties", "patternProperties", "additionalProperties", "propertyNames"),
        *("required", "dependentRequired", "minProperties", "maxProperties"),
    )
)


def schemas_in(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all schemas in it; booleans are left out."""
    if isinstance(schema, SCALARS):
        return
    if isinstance(schema, (list, tuple)):
        for one in schema:
            yield from schemas_in(one)
    elif isinstance(schema, (dict, Mapping)):  # the one that is fast to tell first
        yield schema
        for keyword, value in schema.items():
            if keyword in _SCHEMAS_BY_NAME and isinstance(value, (dict, Mapping)):
                yield from schemas_in(list(value.values()))
            elif keyword not in _DATA:
                yield from schemas_in(value)


def map_schemas(schema: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
    """A copy of a schema in which every schema, inner ones first, is what `change` makes of it."""
    if isinstance(schema, SCALARS):
        return schema
    if isinstance(schema, (list, tuple)):
        return [map_schemas(one, change) for one in schema]
    if not isinstance(schema, (dict, Mapping)):
        return schema
    copied: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in _SCHEMAS_BY_NAME and isinstance(value, (dict, Mapping)):
            copied[keyword] = {name: map_schemas(one, change) for name, one in value.items()}
        else:
            copied[keyword] = value if keyword in _DATA else map_schemas(value, change)
    return change(copied)


def move_references(schema: Any, place: str) -> Any:
    """A schema whose references into itself hold when it stands at `place`, a JSON pointer, in another one."""

    def moved(one: dict[str, Any]) -> dict[str, Any]:
        target = one.get("$ref")
        if isinstance(target, str) and (target == "#" or target.startswith("#/")):
            one["$ref"] = f"#{place}{target[1:]}"
        return one

    return map_schemas(schema, moved)


def close_objects(schema: Any) -> Any:
    """A schema whose objects have no properties but those that it names, where it does not say `additionalProperties`.

    What matches the result matches the schema. Where that is not sure, as several schemas concern one object, nothing
    is changed; nor is an object that needs properties that are not named.
    """
    for one in schemas_in(schema):
        keywords = set(one)
        if keywords & _COMBINING or len(keywords & _REFERRING) > 1:
            return schema
        if keywords & _REFERRING and keywords & _OF_OBJECTS:
            return schema
    return map_schemas(schema, _closed)


def has_plain_options(schema: Any) -> bool:
    """Whether `close_objects` leaves a schema as it is for no other reason than `oneOf`, with nothing beside it.

    Whether a value matches one option only can depend on the properties that the others do not name. So its objects can
    be closed by who knows that, which is `read_schema` without `additional_properties`.
    """
    found = False
    for one in schemas_in(schema):
        keywords = set(one)
        referring = keywords & {*_REFERRING, "oneOf"}
        if keywords & (_COMBINING - {"oneOf"}) or len(referring) > 1 or (referring and keywords & _OF_OBJECTS):
            return False
        if "properties" in keywords and "additionalProperties" not in _closed(dict(one)):
            return False
        found |= "oneOf" in keywords
    return found


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.keys() & {"additionalProperties", "patternProperties", "dependentRequired"}:
        return schema
    named, needed, least = schema.get("properties"), schema.get("required", []), schema.get("minProperties", 0)
    if isinstance(named, Mapping) and isinstance(needed, list) and isinstance(least, int) and least <= len(named):
        if all(isinstance(name, str) and name in named for name in needed):
            schema["additionalProperties"] = False
    return schema
