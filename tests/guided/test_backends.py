"""Every backend: what its masks allow matches, what they do not allow does not, and steps are taken back exactly."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import lark
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from taco.guided.compiler import Compilation
from taco.guided.protocol import CompiledGrammar, GrammarError, Matcher
from taco.guided.selection import Backends
from taco.guided.spec import GrammarKind, GrammarSpec
from taco.guided.vocabulary import Vocabulary, make_vocabulary
from tests.tiny_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

NAMES = ["llguidance", "outlines", "xgrammar"]
VOCABULARIES = [byte_level_tokenizer, sentencepiece_tokenizer]
ARITHMETIC = """
?start: sum
!sum: product (("+" | "-") product)* -> total  // comments and shapes of the tree are of no interest
product: NUMBER | "(" sum ")"
NUMBER: /\\d{1,2}/
"""
LIST = 'root ::= "[" item ("," item)* "]"\nitem ::= [a-c] | "\\"" [x-z]+ "\\""'
LIST_AS_LARK = 'start: "[" item ("," item)* "]"\nitem: /[a-c]/ | "\\"" /[x-z]+/ "\\""'
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PLAIN = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}}, "required": ["a"]}


@pytest.fixture(scope="module", params=VOCABULARIES, ids=lambda make: make.__name__)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    tokenizer = request.param()
    return make_vocabulary(tokenizer, len(tokenizer) + 7)  # models have more logits than that


@pytest.fixture(scope="module")
def backends(vocabulary: Vocabulary) -> Backends:
    return Backends(vocabulary)


def spec(kind: str, source: Any, backend: str = "auto", **options: Any) -> GrammarSpec:
    return GrammarSpec(
        GrammarKind(kind), source if isinstance(source, str) else json.dumps(source), backend=backend, **options
    )


def matches_json(schema: Any) -> Callable[[str], bool]:
    return lambda text: Draft202012Validator(schema).is_valid(json.loads(text))


def parses(grammar: str) -> Callable[[str], bool]:
    parser = lark.Lark(grammar)

    def check(text: str) -> bool:
        try:
            parser.parse(text)
        except lark.exceptions.LarkError:
            return False
        return True

    return check


def matches_regex(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


REGEXES = [r"a(bc)?", "é(à|日本)*", "-?[0-9]{1,3}([.][0-9]+)?", "(?:[a-z]{2}[g-z]{0,3},?){1,3}"]
# With sets beyond ASCII, which xgrammar is not exact about.
WIDE_REGEXES = [r"[^a]{1,6}", r".{3}", r"-?\d{1,3}(\.\d+)?", r"(foo|foobar|fo+)\s?x*", r"\w+@\w+"]
CASES: list[tuple[str, Any, list[str], Callable[[str], bool]]] = [
    *(("regex", pattern, NAMES, matches_regex(pattern)) for pattern in REGEXES),
    *(("regex", pattern, ["llguidance", "outlines"], matches_regex(pattern)) for pattern in WIDE_REGEXES),
    ("choice", ["a", "abc", "ab c", "日本", "é"], NAMES, lambda text: text in ["a", "abc", "ab c", "日本", "é"]),
    ("json", PERSON, ["llguidance"], matches_json(PERSON)),
    ("json", PLAIN, NAMES, matches_json(PLAIN)),
    ("grammar", ARITHMETIC, ["llguidance"], parses(ARITHMETIC)),
    ("grammar", LIST, ["llguidance", "xgrammar"], parses(LIST_AS_LARK)),
]
ALL = [
    pytest.param(kind, source, name, check, id=f"{kind}-{index}-{name}")
    for index, (kind, source, names, check) in enumerate(CASES)
    for name in names
]


def allowed_now(backend: Any, matcher: Matcher, size: int) -> np.ndarray:
    masks = np.full((1, -(-size // 32)), 0x55555555, np.int32)
    assert backend.fill_masks([matcher], masks) == [None]
    return np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")[:size])


def compiled(backends: Backends, wanted: GrammarSpec, name: str) -> tuple[Any, CompiledGrammar]:
    backend, grammar = backends.choose(wanted)
    assert backend.name == name
    return backend, grammar or backend.compile(wanted)


@pytest.mark.parametrize(("kind", "source", "name", "check"), ALL)
def test_walks_through_masks_end_in_texts_that_match(
    backends: Backends, vocabulary: Vocabulary, kind: str, source: Any, name: str, check: Callable[[str], bool]
) -> None:
    options = {"whitespace_pattern": " ?"} if kind == "json" and name != "xgrammar" else {}
    backend, grammar = compiled(backends, spec(kind, source, name, **options), name)
    rng = random.Random(1)
    ends = set(vocabulary.eos_token_ids)
    num_complete = 0
    for _ in range(25):
        matcher = grammar.start()
        path: list[int] = []
        masks: list[list[int]] = []
        while not matcher.must_stop() and len(path) < 60:
            text_so_far = [t for t in allowed_now(backend, matcher, vocabulary.size).tolist() if t not in ends]
            masks.append(text_so_far)
            for token_id in rng.sample(range(vocabulary.size), 12):
                if token_id not in ends:
                    assert matcher.allows(token_id) == (token_id in text_so_far)
            forced = matcher.forced()
            if forced:
                assert text_so_far == [forced[0]] and not matcher.can_stop()
            if matcher.can_stop() and rng.random() < 0.3:
                break
            if not text_so_far:
                break
            assert all(vocabulary.tokens[token_id] for token_id in text_so_far), "no text"
            token_id = rng.choice(text_so_far)
            assert matcher.accept([token_id]) == 1
            path.append(token_id)
        text = b"".join(vocabulary.tokens[token_id] for token_id in path).decode("utf-8", "surrogateescape")
        if matcher.can_stop():
            num_complete += 1
            assert check(text), text
        # Back, and forth again.
        steps = rng.randint(0, len(path))
        matcher.rollback(steps)
        place = len(path) - steps
        if place < len(masks) and not matcher.must_stop():
            again = [t for t in allowed_now(backend, matcher, vocabulary.size).tolist() if t not in ends]
            assert again == masks[place]
        assert matcher.accept(path[place:]) == steps
    assert num_complete >= 3


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        ("regex", r"a(bc)?", ["a", "abc"], ["ab", "", "b", "abca"]),
        ("regex", "^ab$", ["ab"], ["a", "abb"]),
        ("regex", r"\d+", ["1", "٣"], ["a", "1a"]),
        ("choice", ["no", "not now"], ["no", "not now"], ["not", "no "]),
        ("json", PERSON, ['{"name": "x", "age": 7}', '{"name":"","age":0}'], ['{"name": "xyzuv", "age": 7}', "{}"]),
        ("json", {"type": "object"}, ['{"a": [1, {"b": null}]}', "{}"], ["[]", "3"]),
        ("grammar", ARITHMETIC, ["1+2", "(1-22)+3"], ["1+", "+1", "123"]),
        ("grammar", 'start: /a\\/b/ "/"', ["a/b/"], ["a/b"]),
    ],
    ids=str,
)
def test_texts_are_taken_or_not(
    backends: Backends, vocabulary: Vocabulary, kind: str, source: Any, good: list[str], bad: list[str]
) -> None:
    _, grammar = compiled(backends, spec(kind, source), "llguidance")
    for text in [*good, *bad]:
        matcher = grammar.start()
        token_ids = vocabulary.encode(text)
        is_whole = matcher.accept(token_ids) == len(token_ids) and matcher.can_stop()
        assert is_whole == (text in good), text


def test_a_backend_hands_over_what_it_does_not_enforce(backends: Backends, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        for _ in range(2):
            backend, _ = backends.choose(spec("json", PERSON, "outlines"))
            assert backend.name == "llguidance"
    [record] = [record for record in caplog.records if "instead of outlines" in record.message]
    assert "llguidance instead of outlines" in record.message
    assert backends.choose(spec("grammar", ARITHMETIC, "outlines"))[0].name == "llguidance"
    assert backends.choose(spec("regex", "a", "auto"), "xgrammar")[0].name == "xgrammar"
    for pattern in WIDE_REGEXES:
        assert backends.choose(spec("regex", pattern, "xgrammar"))[0].name == "llguidance"
    for value in ({'"': 1}, [{"a": {"b\n": 1}}]):
        assert backends.choose(spec("json", {"const": value}, "outlines"))[0].name == "llguidance"
    assert backends.choose(spec("json", {"const": {"a": '"'}}, "outlines"))[0].name == "outlines"


def test_a_missing_package_is_named_and_another_one_takes_over(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xgrammar", None)
    with caplog.at_level("INFO"):
        assert Backends(vocabulary).choose(spec("regex", "ab", "xgrammar"))[0].name == "llguidance"
    assert "taco-llm[xgrammar]" in caplog.text


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "a(?=b)", "lookahead"),
        ("regex", "(", "regular expression"),
        ("json", {"not": {"type": "string"}}, "not"),
        ("json", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json", "{", "no valid JSON"),
        ("json", {"a": {"type": "integer"}, "b": {}}, "no keyword.*properties"),
        ("json", {"type": "integer", "min": 5}, "did you mean 'minimum'"),
        ("choice", [], "empty"),
        ("grammar", "root ::= [a", "no GBNF"),
        ("grammar", 'start: "a', "start|string|token"),
        ("grammar", "start: other", "other"),
        ("structural_tag", {}, "structures"),
    ],
)
def test_what_is_broken_is_refused_by_name(backends: Backends, kind: str, source: Any, message: str) -> None:
    for name in NAMES:
        with pytest.raises(GrammarError, match=message):
            backends.choose(spec(kind, source, name))


HUGE = 10**400


def chain(length: int, make: Callable[[dict[str, str], int], Any]) -> dict[str, Any]:
    """Definitions of which each refers to the next one."""
    links = {str(i): make({"$ref": f"#/$defs/{i + 1}"}, i) for i in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**links, str(length): {"type": "object"}}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "minLength": HUGE}, "minLength"),
        ({"multipleOf": HUGE}, "multipleOf"),
        ({"type": "integer", "minimum": HUGE}, "minimum"),
        ({"enum": [HUGE]}, "enum"),
        ({"$ref": "#/anyOf/" + "9" * 5000, "anyOf": [{}]}, "nothing at that place"),
        ({"$ref": "#/anyOf/01", "anyOf": [{}, {}]}, "nothing at that place"),
        ({"type": "string", "pattern": r"^\x00$"}, "'pattern'.*cannot be written"),
        (chain(1500, lambda ref, i: {"properties": {f"p{i}": {}}, "allOf": [ref]}), r"\$ref"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("additional_properties", [True, False])
def test_what_is_beyond_numbers_and_stacks_is_refused_by_name(
    backends: Backends, schema: Any, message: str, additional_properties: bool
) -> None:
    with pytest.raises(GrammarError, match=message):
        compiled(backends, spec("json", schema, additional_properties=additional_properties), "llguidance")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": HUGE},
        {"type": "integer", "maximum": HUGE, "minimum": -HUGE},
        {"oneOf": [{"type": "integer", "exclusiveMaximum": HUGE, "minimum": 3}, {"type": "integer", "maximum": 1}]},
        {"type": "number", "minimum": -(2**53) + 1, "exclusiveMaximum": float(-(2**53) + 13)},
        {"type": "object", "properties": {f"key {i}": {"type": "null"} for i in range(1500)}},
        chain(3000, lambda ref, i: ref),
        chain(3000, lambda ref, i: {"type": "object", "properties": {"a": ref}, "required": ["a"]}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_large_but_plain_is_taken(backends: Backends, schema: Any) -> None:
    began = time.process_time()
    backends.choose(spec("json", schema))
    assert time.process_time() - began < 12  # the chains took 13 and 26 s where work grew with the square of the size


def test_grammars_that_no_text_matches_are_refused_as_such(backends: Backends) -> None:
    for grammar in ("start: start", 'start: start "a"', "root ::= root", "root ::= []"):
        with pytest.raises(GrammarError, match="[Nn]o text matches"):
            backend, made = backends.choose(spec("grammar", grammar))
            assert made is None
            backend.compile(spec("grammar", grammar))


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('start: "x" %json {"type": "string", "pattern": "^[^\\"]$"} "y" // %json {', 'x"a"y', r'x"\""y'),
        ('start: %json {"enum": ["a\\/b"]} | "\\/"', '"a/b"', '"a\\/b"'),
        ('start: "%json" " {" | A\nA: %regex {"substring_words": "to be"}', "to", "bee"),
    ],
)
def test_schemas_inside_grammars_are_enforced_as_others(
    backends: Backends, vocabulary: Vocabulary, grammar: str, good: str, bad: str
) -> None:
    _, made = backends.choose(spec("grammar", grammar))
    assert made is not None
    for text, is_good in ((good, True), (bad, False)):
        matcher = made.start()
        token_ids = vocabulary.encode(text)
        assert (matcher.accept(token_ids) == len(token_ids) and matcher.can_stop()) == is_good, text


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('start: %json {"type": "array", "uniqueItems": true}', "'uniqueItems'"),
        ("start: %json {", "%json without valid JSON"),
        ("start: %regex nothing", "%regex without valid JSON"),
    ],
)
def test_what_is_wrong_with_schemas_inside_grammars_is_named(backends: Backends, grammar: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        backends.choose(spec("grammar", grammar))


class Panic(BaseException):
    """As of Rust."""


@pytest.mark.parametrize("source", ["start: /a/", 'start: "' + "a" * 20_000 + '"'], ids=len)
def test_a_library_that_panics_does_so_for_one_row(
    backends: Backends, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, grammar: str) -> Any:
        raise Panic("index out of bounds")

    monkeypatch.setattr("taco.guided.llguidance_backend.LLGuidanceBackend._make_template", fail)
    wanted = spec("grammar", source)
    if len(source) < 10_000:
        with pytest.raises(GrammarError, match="llguidance failed on it: Panic: index out of bounds"):
            backends.choose(wanted)
        return
    backend, made = backends.choose(wanted)
    assert made is None
    compilation = Compilation(wanted, backend)
    compilation.run()
    assert compilation.error == "llguidance failed on it: Panic: index out of bounds"


def test_what_may_take_seconds_is_left_to_the_threads(backends: Backends) -> None:
    for kind, source in (("regex", "a?" * 5001), ("choice", [f"{i:05}" for i in range(2000)])):
        backend, made = backends.choose(spec(kind, source))
        assert backend.name == "llguidance" and made is None
    _, made = backends.choose(spec("json", {"enum": [f"{i:05}" for i in range(2000)]}))
    assert made is not None


FUNCTIONS = {
    "structures": [
        {"begin": "<f=a>", "schema": {"type": "integer", "minimum": 0, "maximum": 9}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "boolean"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
ANSWER = {
    "type": "structural_tag",
    "format": {
        "type": "sequence",
        "elements": [
            {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"},
            {
                "type": "or",
                "elements": [
                    {"type": "regex", "pattern": r"\d/+"},
                    {"type": "json_schema", "json_schema": {"type": "null"}},
                    {"type": "const_string", "value": "none"},
                ],
            },
            {
                "type": "tags_with_separator",
                "separator": ",",
                "tags": [{"begin": "[", "content": {"type": "regex", "pattern": "x+"}, "end": "]"}],
            },
        ],
    },
}


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (FUNCTIONS, ["free text", "a <f=a>3</f> b <f=b>true</f>", "a <f b"], ["<f=a>33</f>", "<f=c>", "<f=a>3"]),
        (
            ANSWER,
            ["<t>any < text</t>1//", "<t></t>null[x],[xx]", "<t>a</t>none"],
            ["<t>a", "1//", "<t>a</t>none[x][x]"],
        ),
        (
            {
                "format": {
                    "type": "triggered_tags",
                    "triggers": ["<"],
                    "at_least_one": True,
                    "stop_after_first": True,
                    "tags": [{"begin": "<a>", "content": {"type": "const_string", "value": "x"}, "end": "<"}],
                }
            },
            ["<a>x<", "text <a>x<"],
            ["text", "<a>x<<a>x<"],
        ),
    ],
)
def test_structural_tags(
    backends: Backends, vocabulary: Vocabulary, source: Any, good: list[str], bad: list[str]
) -> None:
    _, grammar = compiled(backends, spec("structural_tag", source), "llguidance")
    for text in [*good, *bad]:
        matcher = grammar.start()
        token_ids = vocabulary.encode(text)
        is_whole = matcher.accept(token_ids) == len(token_ids) and matcher.can_stop()
        assert is_whole == (text in good), text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"format": {"type": "zzz"}}, "'zzz'.*/format"),
        ({"structures": [{"begin": "<a>", "schema": {}}], "triggers": ["<"]}, '"end".*/structures/0'),
        ({"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["<"]}, "triggers"),
        ({"structures": [{"begin": "<a", "schema": {}, "end": ""}], "triggers": ["<", "<a"]}, "triggers|part of"),
        ({"structures": [{"begin": "<", "schema": {"not": {}}, "end": ""}], "triggers": ["<"]}, "not"),
        ({"format": {"type": "sequence", "elements": [{"type": "any_text"}, {"type": "any_text"}]}}, "any_text"),
    ],
)
def test_broken_structural_tags_are_refused_with_the_place(backends: Backends, source: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        backends.choose(spec("structural_tag", source))
