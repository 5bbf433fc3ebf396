"""Ten thousand constraints, valid and broken ones mixed in batches: each error stays with its row."""

from __future__ import annotations

import copy
import gc
import json
import random
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from taco import LLM, SamplingParams
from taco.outputs import RequestOutput
from taco.sampling_params import GuidedDecodingParams

from . import text_cases
from .oracle import complaint, names_keyword, says_nothing_matches, validator
from .random_model import EOS, PROMPT, closing_bias, save_model
from .schema_cases import HARD_CASES, PLAIN_CASES
from .strategies import regexes, schemas

NUM_CONSTRAINTS = 10_000
BATCH = 400
BATCH_SECONDS = 60.0  # of the processor; some ten times what it takes
MAX_TOKENS = 24


@dataclass
class Case:
    """A constraint.

    Attributes:
        kind: what it is, for the summary.
        constraint: arguments of `GuidedDecodingParams`.
        must_run: whether it is valid, and plain enough to be enforced; None if that is not known.
        judge: says what is wrong with a finished output, or None.
    """

    kind: str
    constraint: dict[str, Any]
    must_run: bool | None = None
    judge: Callable[[str], str | None] = lambda text: None


def drawn(strategy: Any, number: int) -> list[Any]:
    """The same examples of a strategy in every run."""
    found: list[Any] = []

    @settings(
        max_examples=max(1, number // 10),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(strategy, min_size=10, max_size=10))
    def collect(examples: list[Any]) -> None:
        found.extend(examples)

    collect()
    return found


def cases(number: int) -> list[Case]:
    """Constraints of all kinds in a random order that is always the same."""
    random_ = random.Random(20)
    plain, odd = drawn(schemas(plain=True), number // 6), drawn(schemas(), number // 6)
    patterns = drawn(regexes(), number // 8)
    found = [_schema("plain schema", schema, True) for schema in plain]
    found += [_schema("schema", schema, None) for schema in odd]
    found += [_regex("regex", pattern, True) for pattern in patterns]
    found += [_schema("nasty schema", schema, None) for schema in nasty_schemas()]
    found += [_schema("nasty schema", doubling("anyOf", 24, {"const": 1}), None, {"const": 1})]
    found += [_schema("nasty schema", doubling("allOf", 18, {"type": "object"}), None, {"type": "object"})]
    found += [_schema("broken schema", schema, False) for schema in BROKEN_SCHEMAS]
    found += [_regex("nasty regex", pattern, None) for pattern in nasty_regexes()]
    found += [_regex("broken regex", pattern, False) for pattern in text_cases.BROKEN_REGEXES]
    found += [Case("nasty grammar", {"grammar": grammar}) for grammar in nasty_grammars()]
    found += [Case("broken grammar", {"grammar": grammar}, False) for grammar in text_cases.BROKEN_GRAMMARS]
    found += [Case("wrong type", constraint, False) for constraint in WRONG_TYPES]
    found += [_schema("schema by hand", schema, True) for schema in PLAIN_CASES.values()]
    found += [_schema("schema by hand", schema, None) for schema in HARD_CASES.values()]
    grammars = [grammar for grammar, _ in text_cases.LARK.values()] + [one for one, *_ in text_cases.GBNF.values()]
    found += [Case("grammar", {"grammar": grammar}, True) for grammar in grammars]
    texts = [json.dumps(schema, ensure_ascii=False) for schema in (*plain, *odd, *PLAIN_CASES.values())]
    texts = [text for text in texts if len(text) < 3000]
    expressions = [*patterns, *text_cases.REGEXES]
    mutants: list[Callable[[], Case]] = [
        lambda: _schema("mutated text of a schema", mutated(random_, random_.choice(texts)), None),
        lambda: _schema("mutated schema", mutated_value(random_, json.loads(random_.choice(texts))), None),
        lambda: _regex("mutated regex", mutated(random_, random_.choice(expressions)), None),
        lambda: Case("mutated grammar", {"grammar": mutated(random_, random_.choice(grammars))}),
        lambda: _choice("choice", random_choices(random_)),
    ]
    while len(found) < number:
        found.append(random_.choice(mutants)())
    random_.shuffle(found)
    return found[:number]


def _schema(kind: str, schema: Any, must_run: bool | None, judged_as: Any = None) -> Case:
    """`judged_as` is another schema for the same values, where jsonschema would take seconds for this one."""

    def judge(text: str) -> str | None:
        document = schema if judged_as is None else judged_as
        document = json.loads(document) if isinstance(document, str) else document
        try:
            made = validator(document)
            made.check_schema(document)  # also that its patterns are Python's
            if kind.startswith("mutated") and "$schema" not in document and type(made) is not Draft202012Validator:
                return None  # what is broken in a definition must not make it a schema of another draft
        except Exception:  # a mutant that is no schema of any draft, such as {"title": 5}: nothing could judge it
            return None
        try:
            return complaint(document, text)
        except Exception as error:
            return f"jsonschema failed: {type(error).__name__}: {error}"

    return Case(kind, {"json": schema, "whitespace_pattern": " ?"}, must_run, judge)


def _regex(kind: str, pattern: str, must_run: bool | None) -> Case:
    return Case(kind, {"regex": pattern}, must_run, lambda text: _no_match(pattern, text))


def _no_match(pattern: str, text: str) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return None if re.fullmatch(pattern, text) else "re.fullmatch says no"


def _choice(kind: str, choices: list[str]) -> Case:
    is_valid = bool(choices) and "" not in choices and not any("\ud800" <= c <= "\udfff" for c in "".join(choices))
    return Case(kind, {"choice": choices}, is_valid, lambda text: None if text in choices else "no choice")


# Nasty ones by hand


def nested(depth: int, make: Callable[[Any], Any], inner: Any) -> Any:
    for _ in range(depth):
        inner = make(inner)
    return inner


def doubling(keyword: str, depth: int, last: dict[str, Any]) -> dict[str, Any]:
    """A schema that leads to another one by 2**depth ways."""
    definitions = {str(i): {keyword: [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(depth)}
    return {"$ref": "#/$defs/0", "$defs": definitions | {str(depth): last}}


def nasty_schemas() -> list[Any]:
    deep = {"$ref": "#/$defs/0", "$defs": {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(2000)}}
    deep["$defs"]["2000"] = {"type": "null"}
    wide = {f"key {i}": {"anyOf": [{"type": "integer"}, {"type": "null"}]} for i in range(1500)}
    return [
        deep,
        {"enum": [f"{i * i * 7919:x} of a giant enum" for i in range(50_000)]},
        {"enum": list(range(20_000))},
        {"type": "object", "properties": wide},
        {"type": "object", "properties": wide, "required": list(wide), "additionalProperties": False},
        {"type": "object", "properties": {"x" * 20_000: {"const": "y" * 20_000}}, "additionalProperties": False},
        {"anyOf": [{"type": "integer", "minimum": i, "maximum": i + 1} for i in range(800)]},
        {"allOf": [{"type": "integer", "minimum": i} for i in range(300)]},
        {"oneOf": [{"properties": {"k": {"const": i}}, "required": ["k"], "type": "object"} for i in range(150)]},
        {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}, {"type": "null"}]} for i in range(12)]},
        {"allOf": [{"type": "string", "pattern": p} for p in ("a.*b.*c", "d.*e", "^.{3,40}$", "f.*g.*h", "i")]},
        {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"},
        {"type": "string", "pattern": "^(a?){60}a{60}$"},
        {"type": "string", "pattern": "(.*a){12}"},
        {"type": "string", "pattern": "^(.{1,9000}){1,9000}$"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "minLength": 99_999, "maxLength": 100_000},
        {"type": "string", "maxLength": 10**30},
        {"type": "string", "minLength": 10**30},
        {"type": "array", "minItems": 1000, "items": {"type": "null"}},
        {"type": "array", "minItems": 10**9, "items": {"type": "null"}},
        {"type": "array", "maxItems": 10**9},
        {"type": "array", "prefixItems": [{"type": "integer"}] * 3000, "items": False},
        {"type": "integer", "minimum": 10**400},
        {"type": "integer", "maximum": 10**400, "minimum": -(10**400)},
        {"type": "number", "minimum": 1e308, "maximum": 1.7e308},
        {"type": "number", "exclusiveMinimum": 5e-324, "maximum": 1e-323},
        {"type": "integer", "multipleOf": 999_983, "minimum": -(10**15), "maximum": 10**15},
        {"type": "integer", "multipleOf": 999_983, "allOf": [{"multipleOf": 999_979}]},
        {"type": "number", "multipleOf": 1e-300},
        {"const": 10**4000},
        {"enum": [nested(60, lambda inner: [inner], 1)]},
        {"enum": ["\ud800", "x"]},
        {"enum": ["\x00"]},
        {"properties": {"\udfff": {}}, "type": "object"},
        {"type": "object", "properties": {"": {"type": "null"}, "\u0000": {"type": "null"}}},
        {"type": "string", "pattern": "\x00"},
        {"type": "string", "pattern": "\ud83d\ude00"},
        {"type": "string", "pattern": "[\ud800-\udfff]"},
        {"type": "object", "patternProperties": {f"^{c}": {"type": "null"} for c in "abcdefghijklmnop"}},
        {"type": "object", "patternProperties": {f"{c}": {"type": "null"} for c in "abcdefgh"}},
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"$ref": "#/$ref"},
        {"$ref": "#/$defs/a/b/c", "$defs": {"a": {"b": {"c": {"type": "null"}}}}},
        {"$ref": "#/enum/0", "enum": [{"type": "null"}]},
        {"$ref": "##"},
        {"$ref": "#/%zz"},
        {"$ref": ""},
        nested(62, lambda inner: {"items": inner}, {"type": "null"}),
        nested(31, lambda inner: {"anyOf": [inner, {"type": "null"}]}, {"type": "integer"}),
        nested(31, lambda inner: {"properties": {"a": inner}, "required": ["a"], "type": "object"}, {"const": 1}),
        nested(9, lambda inner: {"properties": {"a": inner, "b": inner}, "type": "object"}, {"type": "null"}),
        nested(9, lambda inner: {"type": "array", "items": inner, "minItems": 9, "maxItems": 99}, {"type": "null"}),
        nested(3000, lambda inner: '{"items":' + inner + "}", "true"),
        nested(3000, lambda inner: "[" + inner + "]", ""),
        "[" * 100_000,
        "{" * 100_000,
        '{"type":' * 5000,
        '{"maximum":' + "9" * 10_000 + "}",
        '{"minimum":1e999}',
        '{"type":"string"}' * 2,
        '\ufeff{"type":"string"}',
    ]


def nasty_regexes() -> list[str]:
    return [
        "(a{1000}){1000}",
        "((a{1000}){1000}){1000}",
        "(?:(?:(?:a{100}){100}){100}){100}",
        "a{0,1000000}",
        "(?:a?){1000000}",
        "(?:(?:)*){1000}",
        "((((((a*)*)*)*)*)*)*b",
        "(a|a)*b",
        "(a|aa)+$",
        "(?:a|b|ab)*c" * 50,
        "(.*)(.*)(.*)(.*)(.*)(.*)x",
        "(x+x+)+y",
        "(?:a?){200}a{200}",
        ".*a.{14}",
        "(?:.*a){20}",
        "[^a]*a[^b]{300}",
        "(?i:" + "straße" * 200 + ")",
        r"\w{2000}",
        r"(?:\w\W){1,500}",
        r"[\s\S]{60000}",
        "|".join(f"word {i * i}" for i in range(5000)),
        "|".join("a" * i for i in range(1, 400)),
        "(" * 90 + "a" + ")" * 90,
        "(" * 2000 + "a" + ")" * 2000,
        "(" * 50_000 + "a" + ")" * 50_000,
        "(?:" * 400 + "a" + ")?" * 400,
        "(?:" * 400 + "a" + ")*b" * 400,
        "[" * 3000,
        "a" * 100_000,
        "a?" * 3000,
        "a|" * 20_000 + "b",
        "[" + "".join(chr(i) for i in range(0x4E00, 0x9000, 2)) + "]{3}",
        "[^" + "".join(chr(i) for i in range(0x4E00, 0x9000, 2)) + "]{3}",
        "\ud800",
        "[\ud800-\udfff]",
        r"\ud83d\ude00",
        r"[\ud800-\udbff]x|y",
        "a\x00b",
        r"\x00",
        r"\x00{3}",
        r"[\x00-\x1f]{2}",
        "\U0010ffff\uffff\ufffe",
        "(?:\u202eab\u202c){2}",
        "$^",
        "^$",
        "^*",
        "$*a",
        "(^)*a",
        "(?:^a|b)+",
        "a{99999999999999999999}",
        "a{4294967296}",
        "a{-1}",
        "a{1,0}",
        r"\999",
        r"\N{DIGIT ONE}",
        r"\N{NO SUCH NAME}",
        "(?P<\u00e9>a)",
        "(?P<1>a)",
        "(?(1)a|b)",
        "(?-i:a)",
        "(?aL:a)",
        "(?i)(?-i:A)b",
        "(?#",
        "[[:digit:]]+",
        "[a&&b]||[c~~d]",
        "x*+y",
        "(?>x)y",
        "(?=(?=(?=a)))a",
        "()",
        "|",
        "||||",
        "()*",
    ]


def nasty_grammars() -> list[str]:
    many = "start: rule_0\n" + "\n".join(f'rule_{i}: "a" rule_{i + 1}' for i in range(3000)) + '\nrule_3000: "b"'
    chain = "start: rule_0\n" + "\n".join(f"rule_{i}: rule_{i + 1}" for i in range(3000)) + '\nrule_3000: "b"'
    terminals = "start: T0\n" + "\n".join(f'T{i}: "a" T{i + 1}' for i in range(300)) + '\nT300: "b"'
    doubling = "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "b"'
    rules = "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40)) + '\nr40: "b"'
    return [
        many,
        chain,
        terminals,
        doubling,
        rules,
        many.replace("start:", "root ::=").replace(":", "::=").replace("::=::=", "::="),
        "start: start",
        "start: start start",
        'start: start "a"',
        'start: start "a" | "b"',
        "start: other\nother: start",
        'start: "a" other\nother: "b" start',
        'start: start start | "a"',
        'start: start start | "a" |',
        'start: (start*)* | "a"',
        "start:",
        "start: |",
        'start: ""',
        "start: //",
        "start: /a*/",
        "start: (/a*/)*",
        "start: /()/",
        'start: ("a"*)*',
        'start: (("a"?)+)* "b"',
        'start: "a"~1000000',
        'start: "a"~0..1000000',
        'start: (("a"~1000)~1000)~1000',
        'start: "a"~3..1',
        'start: "a"~-1',
        'start: "a"~99999999999999999999',
        "start: " + "(" * 4000 + '"a"' + ")" * 4000,
        "start: " + "(" * 40_000 + '"a"' + ")" * 40_000,
        "start: " + "[" * 1000 + '"a"' + "]" * 1000,
        "start: " + "(" * 30_000,
        "start: " + " | ".join(f'"word {i}"' for i in range(8000)),
        "start: " + " ".join('"a"?' for _ in range(3000)),
        'start: A\nA: A "a"',
        'start: A\nA: B\nB: A | "x"',
        'start: a{"x"}\na{y}: y | a{y}',
        "start: a{a}",
        'start: "a"\n%ignore "a"',
        'start: "a"\n%ignore /.*/',
        'start: "a"\n%ignore /a*/',
        'start: "a"\n%ignore NOTHING',
        '%ignore " "',
        'start: "a"\n%declare X',
        "start: X\n%declare X",
        'start: "a"\n%override start: "b"',
        'start: "a"\n%extend start: "b"',
        "%import common.WS\nstart: WS",
        "%import common (INT, WORD)\nstart: INT WORD",
        "%import .other (x)\nstart: x",
        "%import unknown.X\nstart: X",
        "start: <|eos|>",
        "start: </s>",
        "start: <[1]>",
        "start: <[0-9999999]>",
        "start: <[99999999999]>",
        'start: %json {"type": "integer"}',
        'start: %json {"type": "strin"}',
        "start: %json {",
        "start: %regex {}",
        'start: "\\ud800"',
        'start: "\ud800"',
        'start: "\\x00"',
        'start: "a\x00"',
        'start: "\u2028" /\u2028/',
        'start: "\U0010ffff"',
        'start: "é" ..',
        'start: "a".."é"',
        'start: "z".."a"',
        'start: "ab".."cd"',
        "start: /(?i:é)/ /ß/i",
        r"start: /\p{Lu}/",
        r"start: /(a)\1/",
        "start: /(?P<a>x)/",
        "start: /a{1000}{1000}/",
        "start: /(a{1000}){1000}/",
        "start: /(a|b|ab)*?c(.*?)d.*?/",
        "start: /.*?/",
        "start: /a??/ /b/",
        'start[lazy]: "a"*',
        "start[max_tokens=2]: /a*/",
        'start[max_tokens=99999999999999999999]: "a"',
        'start[stop="b"]: /a*/',
        'start[temperature=0.5]: "a"',
        'start[capture]: "a"',
        "_start: /a/",
        "?start: ?a\na: /a/",
        "start.5: /a/",
        'start: "a" -> b -> c',
        'start: "a" #\n//\n#',
        "@start: /a/",
        'start: "a" & "b"',
        'start: ~"a"',
        "start: /a/ & /b/",
        "start: /[a-c]/ & ~/b/",
        "\n\n\n",
        "\ufeffstart: /a/",
        "start\u00a0: /a/",
        "st\u00e4rt: /a/",
        "start: /a/\r\nother: /b/\r",
        "root ::= root",
        'root ::= root "a" | "b"',
        "root ::=",
        'root ::= ""',
        'root ::= "a"{1000000}',
        'root ::= ("a"{1000}){1000}',
        'root ::= "a"{3,1}',
        "root ::= " + "(" * 5000 + '"a"' + ")" * 5000,
        r"root ::= [\x00-\xff]",
        r"root ::= [\u0000-\U0010FFFF]",
        "root ::= [z-a]",
        "root ::= []",
        "root ::= [^]",
        r'root ::= "\u00e9" "\x41" "\U0001F600"',
        r"root ::= [\]\-\\^] [\n\t\r]",
        "root ::= [\ud800]",
        "root ::= a | b\na ::= b\nb ::= a",
        'root ::= <think> "a"',
        'root ::= !"a"',
    ]


BROKEN_SCHEMAS: list[Any] = [
    {"type": "strin"},
    {"type": []},
    {"type": [1]},
    {"type": None},
    {"properties": []},
    {"properties": {"a": 1}},
    {"properties": {"a": None}},
    {"required": "a"},
    {"required": [1]},
    {"enum": {}},
    {"enum": []},
    {"anyOf": []},
    {"anyOf": {}},
    {"allOf": [1]},
    {"oneOf": None},
    {"items": 5},
    {"items": "string"},
    {"prefixItems": {}},
    {"$ref": 5},
    {"$ref": "#/nowhere"},
    {"$ref": "#nowhere"},
    {"$ref": "https://example.com/x"},
    {"minimum": "3"},
    {"minimum": None, "type": "integer"},
    {"maxLength": -1},
    {"maxLength": 1.5},
    {"maxItems": "3"},
    {"multipleOf": 0},
    {"multipleOf": -1},
    {"pattern": 5},
    {"pattern": "("},
    {"format": 5},
    {"patternProperties": {"(": {}}},
    {"patternProperties": []},
    {"propertyNames": {"maxLength": 2}},
    {"not": {}},
    {"uniqueItems": True, "type": "array"},
    {"type": "integer", "minimum": 4, "maximum": 3},
    {"name": "string", "age": "integer"},
    {"requird": ["a"]},
    "",
    " ",
    "{",
    "}",
    "null",
    "[]",
    "5",
    '"text"',
    '{"type": "string"',
    "{'type': 'string'}",
    '{"type": "string",}',
    '{"a": NaN}',
]
WRONG_TYPES: list[dict[str, Any]] = [
    *({"json": value} for value in (5, 1.5, True, False, [1], b"{}", object(), {1: 2, (3,): 4}, {"a": object()}, len)),
    *({"regex": value} for value in (5, b"a", ["a"], "", re.compile("a"))),
    *({"choice": value} for value in ([], "ab", 5, {"a": 1}, [None], [["a"]], [b"a"], ["\ud800"], [""], [1.5])),
    *({"grammar": value} for value in ("", " \n", 5, b"start: /a/", ["a"])),
    {"json": {"type": "null"}, "whitespace_pattern": "("},
    {"json": {"type": "null"}, "whitespace_pattern": "x"},
    {"json": {"type": "null"}, "whitespace_pattern": 5},
    {"json": {"type": "null"}, "backend": "nobody"},
    {"json": {"type": "null"}, "backend": 5},
]
_ALPHABET = "\"\\'{}[]()<>|*+?.^$-,:;/#~%&@=! \n\t\r\x00\x01\x7f09aAzé\u0301日😀\u2028\ud800\udc00"


def mutated(random_: random.Random, text: str) -> str:
    """A text with one change or some."""
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        at, to = sorted((random_.randint(0, len(text)), random_.randint(0, len(text))))
        to = min(to, at + 12)
        part = text[at:to]
        change = random_.randrange(9)
        if change == 0:
            text = text[:at] + text[to:]
        elif change == 1:
            text = text[:at] + part * random_.choice([2, 3, 50]) + text[to:]
        elif change == 2:
            text = text[:at] + part[::-1] + text[to:]
        elif change == 3:
            text = text[:at]
        elif change == 4:
            text = text[at:]
        elif change == 5:
            text = text[:at] + random_.choice(_ALPHABET) + text[at:]
        elif change == 6:
            text = text[:at] + random_.choice(_ALPHABET) + text[at + 1 :]
        elif change == 7:
            text = re.sub(r"\d+", lambda _: str(random_.choice([0, -1, 7, 10**6, 10**25])), text, count=1)
        else:
            text = text[:at] + text[at : at + 1] * random_.choice([2, 9, 400]) + text[at + 1 :]
    return text


_VALUES: list[Any] = [None, True, -1, 0, 1.5, 10**20, 1e300, "", "a", "integer", [], {}, ["a"], {"a": 1}, [{}], [[]]]


def mutated_value(random_: random.Random, schema: Any) -> Any:
    """A schema in which something has another value, is gone, or has moved."""
    schema = copy.deepcopy(schema)
    for _ in range(random_.choice([1, 1, 2])):
        places: list[tuple[Any, Any]] = []
        waiting = [schema]
        while waiting:
            one = waiting.pop()
            steps = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
            places += [(one, step) for step in steps]
            waiting += [one[step] for step in steps]
        if not places:
            return schema
        (one, step), (other, there) = random_.choice(places), random_.choice(places)
        change = random_.randrange(4)
        if change == 0:
            one[step] = random_.choice(_VALUES)
        elif change == 1:
            one[step] = copy.deepcopy(other[there])
        elif change == 2 and isinstance(one, dict):
            one[mutated(random_, str(step))] = one.pop(step)
        else:
            del one[step]
    return schema


def random_choices(random_: random.Random) -> list[str]:
    base = random_.choice(text_cases.CHOICES)[:40]
    found = [mutated(random_, text) if random_.random() < 0.3 else text for text in base]
    return found * random_.choice([1, 1, 2])


# The test


def run(llm: LLM, rows: list[tuple[int, Case]]) -> list[RequestOutput]:
    params = [
        SamplingParams(
            temperature=1,
            seed=index,
            max_tokens=MAX_TOKENS,
            logit_bias=closing_bias() if "json" in case.constraint else {EOS: 4.0},
            guided_decoding=GuidedDecodingParams(**case.constraint),
        )
        for index, case in rows
    ]
    return llm.generate([PROMPT] * len(params), params, use_tqdm=False, on_error="return")


def shown(case: Case) -> str:
    return ascii(case.constraint)[:500]


def names_its_problem(case: Case, error: str) -> bool:
    """Whether an error is about this constraint, by the words in it."""
    if case.kind == "wrong type":
        return "guided_decoding" in error
    kind = next(iter(case.constraint))
    if kind == "json":
        schema = case.constraint["json"]
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
        except (ValueError, RecursionError):
            return "json" in error.lower()
        if not isinstance(schema, dict):
            return "json must be" in error
        words = (
            "guided decoding: |whitespace_pattern|backend|nested|cannot be written|no keyword|surrogate|"
            "must be an object|characters"
        )
        return names_keyword(error, schema) or says_nothing_matches(error) or bool(re.search(words, error))
    words = {
        "regex": "expression|regex|positions",
        "choice": "choice",
        "grammar": "grammar|expression|llguidance|constraint|guided decoding",
    }
    return bool(re.search(words[kind], error))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = save_model(tmp_path_factory.mktemp("random-llama"))
    with LLM(str(folder), dtype="float32", kv_cache_memory_bytes=16 << 20, max_num_seqs=64) as llm:
        yield llm


def check(llm: LLM, every: list[Case]) -> Counter[str]:
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    errors: dict[int, str] = {}
    process = psutil.Process()
    resident: list[int] = []
    slowest = 0.0
    for start in range(0, len(every), BATCH):
        rows = list(enumerate(every))[start : start + BATCH]
        began = time.process_time()
        outputs = run(llm, rows)
        seconds = time.process_time() - began
        slowest = max(slowest, seconds)
        if seconds > BATCH_SECONDS:
            wrong.append(f"the batch from {start} on took {seconds:.0f} s")
        assert not llm.llm_engine.has_unfinished_requests()
        for (index, case), output in zip(rows, outputs, strict=True):
            outcome = output.outputs[0].finish_reason
            seen[f"{case.kind}: {outcome}"] += 1
            assert (output.error is not None) == (outcome == "error")
            if output.error is not None:
                errors[index] = output.error
                if case.must_run:
                    wrong.append(f"{shown(case)}\n  is valid, but: {output.error}")
                if not names_its_problem(case, output.error):
                    wrong.append(f"{shown(case)}\n  is not named by: {output.error}")
                continue
            if case.must_run is False:
                wrong.append(f"{shown(case)}\n  ran: {output.outputs[0].text!r}")
            if outcome == "stop" and (reason := case.judge(output.outputs[0].text)):
                wrong.append(f"{shown(case)}\n  allowed {output.outputs[0].text!r}\n  {reason}")
        if start // BATCH % 5 == 0:  # the good rows alone, which have the same neighbours no more
            good = [place for place, output in enumerate(outputs) if output.error is None]
            again = run(llm, [rows[place] for place in good])
            for place, output in zip(good, again, strict=True):
                if output.outputs[0].token_ids != outputs[place].outputs[0].token_ids or output.error is not None:
                    wrong.append(f"{shown(rows[place][1])}\n  depends on other rows")
        gc.collect()
        resident.append(process.memory_info().rss)
        print(
            f"{start + len(rows)}: {seconds:.1f} s, {resident[-1] >> 20} MiB, {process.num_threads()} threads",
            flush=True,
        )
    # Each error is that of its row: it is the same where the row is alone.
    for index in random.Random(21).sample(sorted(errors), min(len(errors), 600)):
        [output] = run(llm, [(index, every[index])])
        if output.error != errors[index]:
            wrong.append(f"{shown(every[index])}\n  got {errors[index]}\n  alone: {output.error}")
    print("\n".join(f"{count:6d} {name}" for name, count in sorted(seen.items())))
    print(f"{len(errors)} errors; the slowest batch took {slowest:.1f} s")
    assert not [thread for thread in threading.enumerate() if thread.name == "taco-grammars"]
    if len(resident) > 10:
        # Grammars are kept up to a size, which is reached early.
        half = len(resident) // 2
        assert max(resident[half:]) < 1.5 * max(resident[:half])
    assert not wrong, f"{len(wrong)} are wrong:\n" + "\n".join(wrong[:40])
    return seen


def test_hundreds_of_constraints_valid_and_broken(llm: LLM) -> None:
    check(llm, cases(400))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")  # of `re` and jsonschema, about mutants
def test_ten_thousand_constraints_valid_and_broken(llm: LLM) -> None:
    every = cases(NUM_CONSTRAINTS)
    assert len(every) == NUM_CONSTRAINTS
    seen = check(llm, every)
    finished = sum(count for name, count in seen.items() if name.endswith(": stop"))
    refused = sum(count for name, count in seen.items() if name.endswith(": error"))
    assert finished > NUM_CONSTRAINTS / 4 and refused > NUM_CONSTRAINTS / 10
