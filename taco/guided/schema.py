"""JSON schemas: what is in them, and in which keywords a library does not enforce.

A schema is read once, keyword by keyword, and only where the standard (Draft 2020-12) has subschemas, and is written
anew with what the libraries understand in the same way: references point into `$defs`, older drafts' spellings become
today's, patterns are anchored and spelt out, formats become patterns, annotations go. A library is given a schema only
if it enforces every keyword that is left.
"""

from __future__ import annotations

import decimal
import difflib
import json
import math
import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from taco.guided.disjoint import are_disjoint
from taco.guided.enforcement import (
    AWKWARD_NAMES,
    ENFORCED,
    ENUM_AND_OTHERS,
    FRACTION_BOUNDS,
    MIXED,
    NEVER_ENFORCED,
    NOTHING,
    OTHERS_BESIDE_NAMED,
    RECURSION,
    SEVERAL_TYPES,
    UNNAMED_REQUIRED,
    UNTYPED,
    NormalSchema,
)
from taco.guided.finiteness import JsonSchema, finite_definitions, is_finite, without_endless
from taco.guided.formats import ANY_TEXT as TEXT_FORMATS
from taco.guided.formats import FORMATS
from taco.guided.formats import NUMBERS as NUMBER_FORMATS
from taco.guided.protocol import GrammarError
from taco.guided.regex import (
    Node,
    Ranges,
    parse_json_pattern,
    parse_name_pattern,
    parse_regex,
    without_chars,
    write_regex,
)

MAX_DEPTH = 64
MAX_CHARS = 4_000_000
MAX_DEFINITIONS = 10_000
MAX_NUMBER = 10**18  # the libraries compute with binary floating point and 64 bits, some of which they need themselves
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

MIN_NUMBER = 1e-15  # what is closer to 0 has too many digits to be told apart
BOUND_DIGITS = 13
# Larger bounds would make grammars that no output reaches the end of, at a cost.
MAX_COUNTS = {
    "minLength": 100_000,
    "maxLength": 100_000,
    "minItems": 1000,
    "maxItems": 10_000,
    "minProperties": 1000,
    "maxProperties": 1000,
}
MAX_MULTIPLE = 1_000_000
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

# Words about a schema, or about what is found by other means; a validator passes over them.
ANNOTATIONS = frozenset(
    """title description default example examples $comment deprecated readOnly writeOnly $schema $id id $anchor
    $dynamicAnchor $recursiveAnchor $vocabulary $defs definitions contentMediaType contentEncoding contentSchema
    discriminator xml externalDocs""".split()
)


def read_schema(text: str, additional_properties: bool = True) -> NormalSchema:
    """Reads a JSON schema.

    Args:
        text: the schema as JSON.
        additional_properties: see `taco.guided.spec.GrammarSpec`.

    Raises:
        GrammarError: it is no schema, nothing can match it, or it has a keyword that no backend enforces.
    """
    return _Reader(_load(text), additional_properties).read()


def _load(text: str) -> Any:
    if len(text) > MAX_CHARS:
        raise GrammarError(f"The JSON schema has {len(text)} characters; at most {MAX_CHARS} can be compiled.")
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise GrammarError(f"The JSON schema is nested deeper than {MAX_DEPTH} levels.") from None
    except ValueError as error:
        raise GrammarError(f"The JSON schema is no valid JSON: {error}.") from None
    level = [document]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        ]
        if not level:
            return document
    raise GrammarError(f"The JSON schema is nested deeper than {MAX_DEPTH} levels.")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


@dataclass(frozen=True)
class _Place:
    """Where a schema stands.

    Args:
        path: JSON pointer.
        closes: objects get no other properties than those that are named here or beside.
        definition: the one of `$defs` that is about the same value.
    """

    path: str
    closes: bool
    definition: str | None = None

    def below(self, *steps: str | int) -> str:
        return "/".join([self.path, *(str(step).replace("~", "~0").replace("/", "~1") for step in steps)])


@dataclass
class _Schema:
    """One schema while it is read: the keywords to come and those that are done."""

    place: _Place
    source: dict[str, Any]
    types: list[str] | None
    closes_beside: bool
    target: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Names:
    """The properties that a schema and those beside it name for one value."""

    properties: dict[str, None] = field(default_factory=dict)
    patterns: dict[str, None] = field(default_factory=dict)
    says_otherwise: bool = False


class _Reader:
    def __init__(self, document: Any, additional_properties: bool) -> None:
        self._document = document
        self._draft = str(document.get("$schema", "")) if isinstance(document, dict) else ""
        self._closes = not additional_properties
        self._uses: dict[str, str] = {}
        self._definitions: dict[tuple[int, bool], str] = {}  # names, by the schema and whether it closes objects
        self._pending: list[tuple[Any, str, bool, str]] = []
        self._beside: dict[str, set[str]] = {}  # definitions that are about the same value as a definition
        self._contradictions: list[str] = []  # why schemas match nothing
        self._refers: dict[str, set[str]] = {}  # definitions to those that they refer to at any depth
        self._reading = ""  # name of a definition
        self._one_of: list[tuple[dict[str, Any], _Place]] = []
        self._given: dict[int, dict[str, Any]] = {}  # see `are_disjoint`

    def read(self) -> NormalSchema:
        root = self._schema(self._document, _Place("#", self._closes))
        definitions: dict[str, JsonSchema] = {}
        while self._pending:
            value, path, closes, name = self._pending.pop()
            self._reading = name
            definitions[name] = self._schema(value, _Place(path, closes, name))
        if _find_loop(self._beside) is not None:
            raise GrammarError(
                "A definition of the JSON schema refers to itself by '$ref' for the same value, with no object or "
                "array in between, so that it says nothing."
            )
        if _find_loop(self._refers) is not None:
            self._uses[RECURSION] = self._uses.get("$ref", "#")
        self._resolve_one_of(definitions)
        finite = finite_definitions(definitions)
        definitions = {name: without_endless(definitions[name], finite) for name in definitions if name in finite}
        root = without_endless(root, finite)
        if not is_finite(root, finite):
            raise GrammarError(f"No JSON value matches the JSON schema: {self._why_none_matches()}.")
        root = {} if isinstance(root, bool) else root
        if any(map(_has_nothing, (root, *definitions.values()))):
            self._uses[NOTHING] = "#"
        return NormalSchema({**root, "$defs": definitions} if definitions else root, self._uses)

    def _why_none_matches(self) -> str:
        if self._contradictions:
            return self._contradictions[0]
        if not isinstance(self._document, dict):
            return "it is false"
        return f"{', '.join(map(repr, self._document))} exclude every value, or ask for another one without end"

    def _child(self, value: Any, schema: _Schema, *steps: str | int) -> JsonSchema:
        """A schema for a part of the value."""
        return self._schema(value, _Place(schema.place.below(*steps), self._closes))

    def _beside_it(self, value: Any, schema: _Schema, *steps: str | int) -> JsonSchema:
        """Another schema for the same value."""
        place = schema.place
        return self._schema(value, _Place(place.below(*steps), schema.closes_beside, place.definition))

    def _schema(self, value: Any, place: _Place) -> JsonSchema:
        if isinstance(value, bool):
            return value
        if not isinstance(value, dict):
            raise _broken(place, None, "a schema must be an object, true or false", value)
        value = self._spell_out_names(value, place)
        for keyword in value:
            _refuse_unknown(keyword, value, place)
        _refuse_no_keyword(value, place)
        source = _modern_spelling(value, place, self._draft)
        types = _types(source, place)
        schema = _Schema(place, source, types, self._close(source, place))
        target = schema.target
        if types is not None and "enum" not in source and "const" not in source:
            target["type"] = types[0] if len(types) == 1 else types
        for keyword in source:
            if keyword in _HANDLERS:
                _HANDLERS[keyword](self, schema, keyword, source[keyword])
        if not target.keys().isdisjoint(_BOUNDS):
            self._given[id(target)] = {bound: source.get(bound) for bound in _BOUNDS}
        if source.get("additionalProperties") is _SHUT:
            self._given.setdefault(id(target), {})["additionalProperties"] = None
        _prefer_whole_numbers(source, target)
        if reason := _contradiction(target):
            self._contradictions.append(f"{reason} at {place.path}")
            return False
        for name in (*(keyword for keyword in target if keyword in ENFORCED), *_combinations(target)):
            self._uses.setdefault(name, place.path)
        return target

    def _spell_out_names(self, value: dict[str, Any], place: _Place) -> dict[str, Any]:
        """The same schema without `propertyNames`, where that is a list or a pattern and nothing else says of names."""
        names = value.get("propertyNames")
        if not value.keys().isdisjoint(("properties", "patternProperties", "unevaluatedProperties")):
            return value
        if isinstance(names, dict) and names.keys() - ANNOTATIONS == {"$ref"} and isinstance(names["$ref"], str):
            names, _ = self._resolve(names["$ref"], place)
        if not isinstance(names, dict):
            return value
        others = value.get("additionalProperties", True)
        rest = {k: v for k, v in value.items() if k != "propertyNames"} | {"additionalProperties": False}
        own = names.keys() - ANNOTATIONS - ({"type"} if names.get("type") == "string" else set())
        if own == {"pattern"} and isinstance(names["pattern"], str):
            node = _parsed_pattern(parse_json_pattern, names["pattern"], place, "propertyNames")
            return {**rest, "patternProperties": {f"^(?:{write_regex(node)})\\Z": others}}
        listed = names.get("enum") if own == {"enum"} else [names["const"]] if own == {"const"} else None
        if not isinstance(listed, list):
            return value
        return {**rest, "properties": {name: others for name in listed if isinstance(name, str)}}

    # Objects without other properties than those that are named

    def _close(self, source: dict[str, Any], place: _Place) -> bool:
        """Shuts out other properties where that is asked for; returns whether the schemas beside do so themselves."""
        own = set(source) - ANNOTATIONS - {"type"}
        if not place.closes or own in ({"anyOf"}, {"oneOf"}, {"$ref"}):
            return place.closes
        names = self._collect(source, place)
        if not names.says_otherwise and (names.properties or names.patterns):
            for keyword, found in (("properties", names.properties), ("patternProperties", names.patterns)):
                if found:
                    source[keyword] = {
                        **source.get(keyword, {}),
                        **{k: True for k in found if k not in source.get(keyword, {})},
                    }
            source["additionalProperties"] = _SHUT
        return False

    def _collect(self, root: Any, place: _Place) -> _Names:
        """What a schema and those beside it name, in the order in which they are written."""
        names = _Names()
        seen: set[int] = set()
        waiting = [root]
        while waiting:
            source = waiting.pop()
            if not isinstance(source, dict) or id(source) in seen:
                continue
            seen.add(id(source))
            for keyword, found in (("properties", names.properties), ("patternProperties", names.patterns)):
                if isinstance(source.get(keyword), dict):
                    found.update(dict.fromkeys(source[keyword]))
            names.says_otherwise |= not {"additionalProperties", "unevaluatedProperties"}.isdisjoint(source)
            beside = [
                option
                for keyword in ("allOf", "anyOf", "oneOf")
                for option in (source[keyword] if isinstance(source.get(keyword), list) else ())
            ]
            if isinstance(source.get("$ref"), str):
                beside.append(self._resolve(source["$ref"], place)[0])
            waiting.extend(reversed(beside))
        return names

    # References

    def _reference(self, schema: _Schema, keyword: str, argument: Any) -> None:
        place = schema.place
        if not isinstance(argument, str):
            raise _broken(place, keyword, "it must be a string", argument)
        value, path = self._resolve(argument, place)
        if value is True:
            return
        key = (id(value), schema.closes_beside)
        if key not in self._definitions:
            if len(self._definitions) >= MAX_DEFINITIONS:
                raise GrammarError(f"The JSON schema has more than {MAX_DEFINITIONS} definitions.")
            self._definitions[key] = str(len(self._definitions))
            self._pending.append((value, path, schema.closes_beside, self._definitions[key]))
        name = self._definitions[key]
        self._refers.setdefault(self._reading, set()).add(name)
        if place.definition is not None:
            self._beside.setdefault(place.definition, set()).add(name)
        schema.target[keyword] = f"#/$defs/{name}"

    def _resolve(self, reference: str, place: _Place) -> tuple[Any, str]:
        """The schema that is referred to, and its path."""
        base, _, fragment = reference.partition("#")
        own = self._document.get("$id") if isinstance(self._document, dict) else None
        if base and base != (own.partition("#")[0] if isinstance(own, str) else None):
            raise GrammarError(
                f"The JSON schema has '$ref' = {reference!r} at {place.path}; only references into the schema itself, "
                "which begin with #, are followed."
            )
        fragment = urllib.parse.unquote(fragment)
        if fragment and not fragment.startswith("/"):
            for value, path in _subschemas(self._document, "#"):
                if (
                    fragment in (value.get("$anchor"), value.get("$dynamicAnchor"))
                    or value.get("$id") == f"#{fragment}"
                ):
                    return value, path
            raise _broken(place, "$ref", "there is no such anchor", reference)
        value = self._document
        for step in fragment.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and step in value:
                value = value[step]
            elif isinstance(value, list) and _INDEX.fullmatch(step) and int(step) < len(value):
                value = value[int(step)]
            else:
                raise _broken(place, "$ref", "there is nothing at that place", reference)
        return value, f"#{fragment}"

    def _resolve_one_of(self, definitions: dict[str, JsonSchema]) -> None:
        """Writes `anyOf` for `oneOf`, which says the same where no value matches two options."""

        def resolve(reference: str) -> JsonSchema:
            return definitions[reference.rpartition("/")[2]]

        for target, place in self._one_of:
            options = target.pop("oneOf")
            if not are_disjoint(options, resolve, self._given):
                raise GrammarError(
                    f"The JSON schema has 'oneOf' at {place.path} with options that a value may match at the same "
                    "time, which no backend enforces. Use anyOf, or tell them apart by type or by a required property "
                    "with different constants."
                )
            if "anyOf" in target:
                target["allOf"] = [*target.get("allOf", ()), {"anyOf": options}]
                self._uses.setdefault("allOf", place.path)
            else:
                target["anyOf"] = options
            self._uses.setdefault("anyOf", place.path)

    # Keywords, one kind per method

    def _values(self, schema: _Schema, keyword: str, argument: Any) -> None:
        if "enum" in schema.target:  # both enum and const
            schema.target.setdefault("allOf", []).append({"enum": schema.target.pop("enum")})
        if keyword == "enum" and not isinstance(argument, list):
            raise _broken(schema.place, keyword, "it must be a list", argument)
        values = argument if keyword == "enum" else [argument]
        for value in values:
            _check_value(value, schema.place, keyword)
        if schema.types is not None:
            types = schema.types
            values = [value for value in values if any(_has_type(value, name) for name in types)]
        schema.target["enum"] = list({json.dumps(value): value for value in map(_plain_numbers, values)}.values())

    def _options(self, schema: _Schema, keyword: str, argument: Any) -> None:
        if not isinstance(argument, list) or not argument:
            raise _broken(schema.place, keyword, "it must be a list of at least one schema", argument)
        options = [self._beside_it(option, schema, keyword, index) for index, option in enumerate(argument)]
        if keyword == "oneOf":
            self._one_of.append((schema.target, schema.place))
        schema.target[keyword] = [*schema.target.get(keyword, ()), *options]

    def _properties(self, schema: _Schema, keyword: str, argument: Any) -> None:
        if not isinstance(argument, dict):
            raise _broken(schema.place, keyword, "it must be an object", argument)
        for name in argument:
            _check_value(name, schema.place, keyword)
        schema.target[keyword] = {name: self._child(value, schema, keyword, name) for name, value in argument.items()}

    def _pattern_properties(self, schema: _Schema, keyword: str, argument: Any) -> None:
        if not isinstance(argument, dict):
            raise _broken(schema.place, keyword, "it must be an object", argument)
        patterns: dict[str, JsonSchema] = {}
        for pattern, value in argument.items():
            node = _parsed_pattern(parse_name_pattern, pattern, schema.place, keyword)
            part = self._child(value, schema, keyword, pattern)
            try:
                written = _anchored(node)
            except GrammarError:  # no name that can be written matches
                continue
            if written in patterns:
                raise _broken(schema.place, keyword, "two patterns are the same", pattern)
            patterns[written] = part
        if patterns:
            schema.target[keyword] = patterns

    def _required(self, schema: _Schema, keyword: str, argument: Any) -> None:
        if not isinstance(argument, list) or not all(isinstance(name, str) for name in argument):
            raise _broken(schema.place, keyword, "it must be a list of names, beside `properties`", argument)
        for name in argument:
            _check_value(name, schema.place, keyword)
        if argument:
            schema.target[keyword] = list(dict.fromkeys(argument))

    def _part(self, schema: _Schema, keyword: str, argument: Any) -> None:
        if argument is _SHUT:
            schema.target[keyword] = False
            return
        part = self._child(argument, schema, keyword)
        if part is not True and part != {}:
            schema.target[keyword] = part

    def _prefix_items(self, schema: _Schema, keyword: str, argument: Any) -> None:
        if not isinstance(argument, list):
            raise _broken(schema.place, keyword, "it must be a list of schemas", argument)
        items = [self._child(item, schema, keyword, index) for index, item in enumerate(argument)]
        if items:
            schema.target[keyword] = items

    def _count(self, schema: _Schema, keyword: str, argument: Any) -> None:
        if not _is_whole(argument) or argument < 0:
            raise _broken(schema.place, keyword, "it must be a whole number, 0 or larger", argument)
        limit = MAX_COUNTS[keyword]
        if argument > limit:
            if keyword.startswith("max"):  # fewer are allowed than could be
                argument = limit
            else:
                raise _broken(schema.place, keyword, f"at most {limit} can be enforced", argument)
        if keyword == "minProperties" and (argument := self._min_properties(schema, int(argument))) == 0:
            return
        if argument or keyword.startswith("max"):
            schema.target[keyword] = int(argument)

    def _min_properties(self, schema: _Schema, argument: int) -> int:
        required = schema.source.get("required")
        if isinstance(required, list) and argument <= len({name for name in required if isinstance(name, str)}):
            return 0
        is_closed = schema.source.get("additionalProperties") is False and not schema.source.get("patternProperties")
        if argument > 1 and not is_closed:
            # A name may come twice, and counts once.
            raise GrammarError(
                f"The JSON schema has 'minProperties' = {argument} at {schema.place.path} next to properties that it "
                "does not name, which no backend enforces; list the names, or use 1."
            )
        return argument

    def _bound(self, schema: _Schema, keyword: str, argument: Any) -> None:
        _check_number(argument, schema.place, keyword)
        target = schema.target
        is_least, is_strict = keyword.endswith("inimum"), keyword.startswith("exclusive")
        if (argument if is_least else -argument) > MAX_NUMBER / 10:
            raise _broken(schema.place, keyword, f"numbers beyond {MAX_NUMBER / 10:.0e} are not supported", argument)
        bound = _inner_bound(argument, is_least, is_strict, schema.types == ["integer"])
        keyword, tighter = ("minimum", max) if is_least else ("maximum", min)
        target[keyword] = tighter(target.get(keyword, bound), bound)

    def _multiple(self, schema: _Schema, keyword: str, argument: Any) -> None:
        _check_number(argument, schema.place, keyword)
        if argument <= 0:
            raise _broken(schema.place, keyword, "it must be larger than 0", argument)
        if not _is_whole(argument * 8) or argument > MAX_MULTIPLE:
            raise GrammarError(
                f"The JSON schema has 'multipleOf' = {str(argument):.40} at {schema.place.path}, which no backend "
                "enforces: most fractions are not exact in binary, so that validators differ. Use a whole number up to "
                f"{MAX_MULTIPLE}, or a multiple of 0.125."
            )
        schema.target[keyword] = int(argument) if _is_whole(argument) else argument

    def _pattern(self, schema: _Schema, keyword: str, argument: Any) -> None:
        if not isinstance(argument, str):
            raise _broken(schema.place, keyword, "it must be a string", argument)
        node = _parsed_pattern(parse_json_pattern, argument, schema.place, keyword)
        try:
            self._add_pattern(schema, node)
        except GrammarError as error:
            raise _broken(schema.place, keyword, error.message, argument) from None

    def _format(self, schema: _Schema, keyword: str, argument: Any) -> None:
        if not isinstance(argument, str):
            raise _broken(schema.place, keyword, "it must be a string", argument)
        types = schema.types or TYPES
        if argument in FORMATS:
            if "string" in types:
                self._add_pattern(schema, parse_regex(FORMATS[argument]))
        elif argument in NUMBER_FORMATS:
            bounds = NUMBER_FORMATS[argument]
            if bounds is not None and not {"number", "integer"}.isdisjoint(types):
                for bound, number in zip(("minimum", "maximum"), bounds, strict=True):
                    self._bound(schema, bound, number)
        elif argument not in TEXT_FORMATS:
            raise GrammarError(
                f"The JSON schema has 'format' = {argument!r} at {schema.place.path}, which no backend enforces; known "
                f"are {', '.join(sorted(FORMATS))}. Use pattern, or leave it out."
            )

    def _add_pattern(self, schema: _Schema, node: Node) -> None:
        if "pattern" in schema.target:  # next to a format
            schema.target.setdefault("allOf", []).append({"pattern": _anchored(node)})
            self._uses.setdefault("pattern", schema.place.path)
        else:
            schema.target["pattern"] = _anchored(node)


def _find_loop(edges: dict[str, set[str]]) -> str | None:
    """A node that can be reached from itself."""
    done: set[str] = set()
    for start in edges:
        path = {start: None} if start not in done else {}
        branches = [iter(edges[start])] if path else []
        while branches:
            node = next(branches[-1], None)
            if node is None:
                branches.pop()
                done.add(path.popitem()[0])
            elif node in path:
                return node
            elif node not in done:
                path[node] = None
                branches.append(iter(edges.get(node, ())))
    return None


_SHUT: Any = object()  # additionalProperties that the schema does not name, and that are not wanted

_Handler = Callable[[_Reader, _Schema, str, Any], None]
_HANDLERS: dict[str, _Handler] = {
    "enum": _Reader._values,
    "const": _Reader._values,
    "anyOf": _Reader._options,
    "oneOf": _Reader._options,
    "allOf": _Reader._options,
    "$ref": _Reader._reference,
    "properties": _Reader._properties,
    "patternProperties": _Reader._pattern_properties,
    "additionalProperties": _Reader._part,
    "required": _Reader._required,
    "items": _Reader._part,
    "prefixItems": _Reader._prefix_items,
    "pattern": _Reader._pattern,
    "format": _Reader._format,
    "multipleOf": _Reader._multiple,
    **dict.fromkeys(MAX_COUNTS, _Reader._count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _Reader._bound),
}
_KNOWN = frozenset((*_HANDLERS, *ANNOTATIONS, *NEVER_ENFORCED, "type", "additionalItems"))
_OF_ONE_TYPE = frozenset(_HANDLERS) - {"enum", "const", "anyOf", "oneOf", "allOf", "$ref"}


def _broken(place: _Place, keyword: str | None, what: str, value: Any) -> GrammarError:
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    name = f"{keyword!r} = " if keyword else ""
    return GrammarError(f"The JSON schema has {name}{shown} at {place.path}: {what}.")


_MISTAKEN = {"property": ["properties"], "propertys": ["properties"], "min": ["minimum"], "max": ["maximum"]}


def _refuse_no_keyword(source: dict[str, Any], place: _Place) -> None:
    """What has names but no keyword is meant as something else: properties, or an example."""
    if source and _KNOWN.isdisjoint(source) and not any(keyword.startswith("x-") for keyword in source):
        raise GrammarError(
            f"The JSON schema has no keyword at {place.path}, only {list(source)[:5]}. If these are properties, write "
            '{"type": "object", "properties": {...}}; any value is {}.'
        )


def _refuse_unknown(keyword: str, source: dict[str, Any], place: _Place) -> None:
    if keyword in _HANDLERS or keyword in ANNOTATIONS or keyword in ("type", "additionalItems"):
        return
    if keyword in NEVER_ENFORCED:
        if not _has_no_effect(keyword, source[keyword], source):
            hint = '; list "null" among the types instead' if keyword == "nullable" else ""
            raise GrammarError(f"The JSON schema has {keyword!r} at {place.path}, which no backend enforces{hint}.")
    elif keyword == "x-guidance":
        raise GrammarError(f"The JSON schema has 'x-guidance' at {place.path}; use whitespace_pattern instead.")
    elif not keyword.startswith("x-"):
        plain = keyword.replace("_", "").replace("-", "").lower()
        same = [known for known in _KNOWN if known.lower() == plain] or _MISTAKEN.get(plain, [])
        if close := same or difflib.get_close_matches(keyword, sorted(_KNOWN), n=1, cutoff=0.85):
            raise GrammarError(
                f"The JSON schema has {keyword!r} at {place.path}, which is no keyword; did you mean {close[0]!r}? "
                "Names that are meant as notes may begin with x-."
            )


def _has_no_effect(keyword: str, argument: Any, source: dict[str, Any]) -> bool:
    if keyword in ("uniqueItems", "nullable"):
        return argument is False
    if keyword == "if":
        return "then" not in source and "else" not in source
    if keyword in ("then", "else"):
        return "if" not in source
    if keyword in ("minContains", "maxContains"):
        return "contains" not in source
    if keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        return argument == {}
    if keyword in ("unevaluatedProperties", "unevaluatedItems"):
        # Without schemas beside it, it says what additionalProperties or items would.
        return argument is True or source.keys().isdisjoint(("anyOf", "oneOf", "allOf", "$ref"))
    return keyword == "propertyNames" and argument in (True, {})


def _modern_spelling(value: dict[str, Any], place: _Place, draft: str) -> dict[str, Any]:
    """The schema in the words of Draft 2020-12."""
    source = dict(value)
    if "prefixItems" in source and _OLD_DRAFT.search(draft):
        raise _broken(
            place, "prefixItems", f"{draft}, which $schema names, does not have it yet", source["prefixItems"]
        )
    for bound in ("Minimum", "Maximum"):  # Draft 4
        exclusive = source.get(f"exclusive{bound}")
        if isinstance(exclusive, bool):
            del source[f"exclusive{bound}"]
            if exclusive and bound.lower() in source:
                source[f"exclusive{bound}"] = source.pop(bound.lower())
    rest = source.pop("additionalItems", None)
    if isinstance(source.get("items"), list):  # before Draft 2020-12
        prefix = source.pop("items")
        if "prefixItems" in source:
            raise _broken(place, "items", "it must be a schema where prefixItems is a list", prefix)
        source["prefixItems"] = prefix
        if rest is not None:
            source["items"] = rest
    if "unevaluatedProperties" in source:
        source.setdefault("additionalProperties", source["unevaluatedProperties"])
    if "unevaluatedItems" in source:
        source.setdefault("items", source["unevaluatedItems"])
    return source


def _types(source: dict[str, Any], place: _Place) -> list[str] | None:
    """The types that values can have; None if the schema does not say."""
    types = source.get("type")
    whole = _is_whole(source.get("multipleOf"))
    if "type" not in source:
        if not whole:
            return None
        types = list(TYPES)
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list) or not types or not all(name in TYPES for name in types):
        raise _broken(place, "type", f"it must be one of {', '.join(TYPES)}, or a list of these", source["type"])
    if whole:  # no number is written with a fraction then: beyond 2**53 fractions are not told apart
        types = ["integer" if name == "number" else name for name in types]
    elif "number" in types:
        types = [name for name in types if name != "integer"]
    return list(dict.fromkeys(types))


def _prefer_whole_numbers(source: dict[str, Any], target: dict[str, Any]) -> None:
    """Where bounds are too close for fractions to be enforced, as `_inner_bound` has it, whole numbers may still be."""
    if target.get("type") != "number" or target.get("minimum", -math.inf) <= target.get("maximum", math.inf):
        return
    bounds = {
        name: _inner_bound(source[name], name.endswith("inimum"), name.startswith("exclusive"), True)
        for name in _BOUNDS
        if name in source
    }
    least = max((bound for name, bound in bounds.items() if name.endswith("inimum")), default=math.inf)
    most = min((bound for name, bound in bounds.items() if name.endswith("aximum")), default=-math.inf)
    if least <= most and "format" not in source:  # which may have bounds, too
        target.update(type="integer", minimum=least, maximum=most)


def _contradiction(target: dict[str, Any]) -> str | None:
    """Why no value matches; types for which that is so are taken out, as long as others are left."""
    if target.get("enum") == []:
        return "'enum' or 'const' has no value that its 'type' allows"
    if "type" not in target:
        return None
    types = target["type"] if isinstance(target["type"], list) else [target["type"]]
    reason, left = None, []
    for name in types:
        least, most = _LIMITS.get(name, ("", ""))
        if target.get(least, -math.inf) > target.get(most, math.inf):
            reason = f"{least!r} is larger than {most!r}"
            if name == "number":
                reason += f", with the {BOUND_DIGITS} digits that can be enforced"
        else:
            left.append(name)
    if left:
        target["type"] = left[0] if len(left) == 1 else left
        return None
    return reason


_LIMITS = {
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum"),
    "string": ("minLength", "maxLength"),
    "array": ("minItems", "maxItems"),
    "object": ("minProperties", "maxProperties"),
}


def _combinations(target: dict[str, Any]) -> Iterator[str]:
    """The entries of `ENFORCED` that keywords need together."""
    keywords = target.keys() - {"type"}
    if "enum" in keywords and len(keywords) > 1:
        yield ENUM_AND_OTHERS
    if keywords & {"anyOf", "oneOf", "allOf", "$ref"} and len(target) > 1:
        yield MIXED
    if "type" not in target and keywords & _OF_ONE_TYPE:
        yield UNTYPED
    if isinstance(target.get("type"), list):
        yield SEVERAL_TYPES
    if target.get("type") != "integer" and not keywords.isdisjoint(_BOUNDS):
        yield FRACTION_BOUNDS
    names = target.get("properties", {})
    if any(map(_is_awkward, names)) or any(map(_has_awkward_names, target.get("enum", ()))):
        yield AWKWARD_NAMES
    if not names.keys() >= set(target.get("required", ())):
        yield UNNAMED_REQUIRED
    if names and target.get("additionalProperties", False) is not False:
        yield OTHERS_BESIDE_NAMED


def _parsed_pattern(parse: Callable[[str], Node], pattern: str, place: _Place, keyword: str) -> Node:
    try:
        return parse(pattern)
    except GrammarError as error:
        raise GrammarError(f"{keyword!r} of the JSON schema at {place.path}: {error.message}") from None


def _anchored(node: Node) -> str:
    """The pattern that a library gets.

    Raises:
        GrammarError: it asks for characters that cannot be written.
    """
    # llguidance takes a class with all control characters for one with `"` and `\\`, as these have escapes as well.
    return f"^(?:{write_regex(without_chars(node, _NO_ESCAPE))})$"


def _is_whole(value: Any) -> bool:
    if isinstance(value, int):  # of any size, also beyond what a double can be
        return not isinstance(value, bool)
    return isinstance(value, float) and value.is_integer()


def _check_number(value: Any, place: _Place, keyword: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _broken(place, keyword, "it must be a number", value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _broken(place, keyword, "it is beyond what JSON readers know", str(value))
    if 0 < abs(value) < MIN_NUMBER:
        raise _broken(place, keyword, f"numbers closer to 0 than {MIN_NUMBER} are not supported", value)


def _inner_bound(bound: float, is_least: bool, is_strict: bool, is_whole: bool) -> int | float:
    """A bound, itself allowed, within the one that is given and as near to it as can be enforced.

    A number that is written beyond a strict bound may be read as that bound, and libraries lose digits of bounds that
    have as many as a double holds: bounds get fewer digits.
    """
    bound = max(bound, -MAX_NUMBER) if is_least else min(bound, MAX_NUMBER)
    if is_whole:
        step = 1 if is_least else -1
        nearest = math.ceil(bound) if is_least else math.floor(bound)
        nearest += step if is_strict and nearest == bound else 0
        while float(nearest) != nearest:  # beyond 2**53 a double is even
            nearest += step
        return nearest
    if is_strict and bound == 0:
        return MIN_NUMBER if is_least else -MIN_NUMBER
    exact = decimal.Decimal(repr(bound))
    context = decimal.Context(BOUND_DIGITS, decimal.ROUND_CEILING if is_least else decimal.ROUND_FLOOR)
    inner = context.plus(exact)
    if is_strict and inner == exact:
        unit = decimal.Decimal(1 if is_least else -1).scaleb(inner.adjusted() - BOUND_DIGITS + 1)
        inner = context.add(inner, unit)
    return int(inner) if inner == inner.to_integral_value() else float(inner)


def _check_value(value: Any, place: _Place, keyword: str) -> None:
    """Refuses values that cannot be written, or not in one way only."""
    if isinstance(value, str):
        if found := _UNWRITABLE.search(value):
            what = "half a surrogate pair" if found[0] >= "\ud800" else "control characters"
            raise _broken(place, keyword, f"{what} cannot be enforced", value)
    elif isinstance(value, dict):
        for name, part in value.items():
            _check_value(name, place, keyword)
            _check_value(part, place, keyword)
    elif isinstance(value, list):
        for part in value:
            _check_value(part, place, keyword)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(value, place, keyword)
        if abs(value) > MAX_NUMBER or float(value) != value:
            raise _broken(place, keyword, f"numbers beyond {MAX_NUMBER:.0e}, or 2**53 if odd, are not exact", value)


def _is_awkward(name: str) -> bool:
    return _AWKWARD.search(name) is not None


def _has_awkward_names(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_awkward, value)) or any(map(_has_awkward_names, value.values()))
    return isinstance(value, list) and any(map(_has_awkward_names, value))


def _plain_numbers(value: Any) -> Any:
    """The same value; whole numbers are written without a fraction, so that 0 has no sign."""
    if isinstance(value, float):
        return int(value) if _is_whole(value) else value
    if isinstance(value, list):
        return [_plain_numbers(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain_numbers(part) for name, part in value.items()}
    return value


# Control characters that have no letter of their own behind a backslash.
_NO_ESCAPE: Ranges = ((0x00, 0x07), (0x0B, 0x0B), (0x0E, 0x1F))
_INDEX = re.compile("0|[1-9][0-9]{0,9}")
_OLD_DRAFT = re.compile("draft-0[3-7]|2019-09")
_AWKWARD = re.compile(r'["\\\x00-\x1f\x7f-\x9f]')
# Control characters that have no letter of their own behind a backslash, and halves of surrogate pairs.
_UNWRITABLE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")


def _has_type(value: Any, name: str) -> bool:
    if name in ("number", "integer"):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (name == "number" or _is_whole(value))
    return isinstance(value, _PYTHON_TYPES[name])


_PYTHON_TYPES: dict[str, type] = {"null": type(None), "boolean": bool, "string": str, "array": list, "object": dict}


def _subschemas(value: Any, path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """All objects in a document, with their paths."""
    if isinstance(value, dict):
        yield value, path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, child in children:
        yield from _subschemas(child, f"{path}/{step}")


def _has_nothing(schema: JsonSchema) -> bool:
    """Whether some part must not be there; other properties are another matter."""
    if isinstance(schema, bool):
        return not schema
    parts = [part for keyword in ("anyOf", "allOf", "prefixItems") for part in schema.get(keyword, ())]
    parts += [part for keyword in ("properties", "patternProperties") for part in schema.get(keyword, {}).values()]
    parts += [schema.get("items", True), schema.get("additionalProperties") or True]
    return any(map(_has_nothing, parts))
