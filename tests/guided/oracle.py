"""Judges of guided outputs that share nothing with the engine: jsonschema, `re`, Lark, and a few formats by hand."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema

# What any backend has to run. A schema made of these alone must not be refused.
PLAIN = frozenset(
    "type properties required items enum const minimum maximum exclusiveMinimum exclusiveMaximum minLength maxLength "
    "minItems maxItems anyOf $ref $defs definitions additionalProperties prefixItems "
    "title description default examples $comment deprecated readOnly writeOnly $schema $id".split()
)
_WORDS = frozenset("if then else not contains format items type const enum pattern required properties".split())

_PCT = r"%[0-9A-Fa-f]{2}"
_UNRESERVED = r"[A-Za-z0-9\-._~]"
_SUB = r"[!$&'()*+,;=]"
_PCHAR = rf"(?:{_UNRESERVED}|{_PCT}|{_SUB}|[:@])"
_URI = re.compile(
    rf"[A-Za-z][A-Za-z0-9+\-.]*:"
    rf"(?://(?:(?:{_UNRESERVED}|{_PCT}|{_SUB}|:)*@)?"
    rf"(?:\[[0-9A-Fa-f:.v{_SUB[1:-1]}~_\-]+\]|(?:{_UNRESERVED}|{_PCT}|{_SUB})*)(?::[0-9]*)?(?:/{_PCHAR}*)*"
    rf"|/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?|{_PCHAR}+(?:/{_PCHAR}*)*|)"
    rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:\#(?:{_PCHAR}|[/?])*)?"
)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?"
_BY_HAND = {
    "uri": _URI,
    "hostname": re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*"),
    "json-pointer": re.compile(r"(?:/(?:[^~/]|~[01])*)*", re.DOTALL),
    "duration": re.compile(
        r"P(?:\d+W|(?=[\dT])(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?=\d)(?:\d+H)?(?:\d+M)?(?:\d+S)?)?)", re.ASCII
    ),
}


def _formats() -> Any:
    """The checks of jsonschema, and some more."""
    checker = copy.deepcopy(jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for name, pattern in _BY_HAND.items():
        checker.checks(name)(lambda text, pattern=pattern: not isinstance(text, str) or bool(pattern.fullmatch(text)))
    return checker


FORMATS = _formats()


def validator(schema: Any) -> Any:
    """For what the schema says it is written in; else for the newest draft of which it is a schema.

    Raises:
        jsonschema.SchemaError: the schema is not one of the draft that it names.
    """
    return _validator(json.dumps(schema))


@functools.lru_cache(maxsize=64)  # a check takes longer than what follows
def _validator(text: str) -> Any:
    schema = json.loads(text)
    any_patterns = jsonschema.FormatChecker(())  # they may not be Python's
    if isinstance(schema, dict) and "$schema" in schema:
        named = jsonschema.validators.validator_for(schema)
        named.check_schema(schema, format_checker=any_patterns)
        return named(schema, format_checker=FORMATS)
    for draft in (jsonschema.Draft202012Validator, jsonschema.Draft7Validator, jsonschema.Draft4Validator):
        try:
            draft.check_schema(schema, format_checker=any_patterns)
        except jsonschema.SchemaError:
            continue
        return draft(schema, format_checker=FORMATS)
    raise AssertionError(f"no draft knows this schema: {schema}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def complaint(schema: Any, text: str) -> str | None:
    """What is wrong with an output; None if it is JSON and valid."""
    try:
        instance = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        return f"not JSON: {error}"
    error = jsonschema.exceptions.best_match(validator(schema).iter_errors(instance))
    return error and f"{error.json_path}: {error.message}"


def keywords(schema: Any) -> set[str]:
    """The keywords of a schema and of the schemas in it."""
    found: set[str] = set()
    for one in _subschemas(schema):
        found |= set(one)
    return found


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(schema, dict):
        return
    yield schema
    for keyword, value in schema.items():
        if keyword in ("enum", "const", "default", "examples", "required"):
            continue
        if keyword in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"):
            children = list(value.values()) if isinstance(value, dict) else []
        else:
            children = value if isinstance(value, list) else [value]
        for child in children:
            yield from _subschemas(child)


def names_keyword(message: str, schema: Any) -> bool:
    """Whether a refusal names one of the schema's keywords; words that are English too must be marked as such."""
    for keyword in keywords(schema):
        word = re.escape(keyword)
        marked = rf"[\"'`]{word}[\"'`]|(?:has|keyword) {word} (?:= .* )?at"
        if re.search(marked if keyword in _WORDS else rf"(?<![\w$]){word}(?!\w)", message):
            return True
    return False


def says_nothing_matches(message: str) -> bool:
    """Whether a schema was refused because no value can be valid."""
    return bool(re.search("no json value|unsatisfiable", message, re.IGNORECASE))
