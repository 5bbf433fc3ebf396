"""Outputs that have finished match their constraints, by judges that share nothing with the engine.

The model is random and nearly indifferent between tokens, so it goes wherever a grammar lets it. Where a random walk
would hardly get, a logits processor leads it: to texts that are nearly right.
"""

from __future__ import annotations

import enum
import functools
import gc
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lark
import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from taco import LLM, SamplingParams
from taco.outputs import RequestOutput
from taco.sampling_params import GuidedDecodingParams, StructuredOutputsParams

from . import text_cases
from .oracle import PLAIN, complaint, keywords, names_keyword, says_nothing_matches
from .random_model import EOS, PROMPT, closing_bias, save_model, steered
from .schema_cases import HARD_CASES, OBJECT, PLAIN_CASES, REACHABLE, TEMPTATIONS
from .strategies import near_misses, regexes, schemas

Constraint = dict[str, Any]  # arguments of GuidedDecodingParams
# Nothing is shrunk: the message names the one schema of many that is wrong.
FEW = settings(
    max_examples=15,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    verbosity=Verbosity.quiet,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=150, derandomize=False)


def many(backend: str) -> tuple[settings, int]:
    """Settings, and a number of constraints that these make at least; few where compiling them takes minutes."""
    return (settings(MANY, max_examples=10), 80) if backend == "outlines" else (MANY, 1000)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = save_model(tmp_path_factory.mktemp("random-llama"))
    with LLM(str(folder), dtype="float32", kv_cache_memory_bytes=16 << 20, max_num_seqs=64) as llm:
        yield llm


@dataclass
class Tally:
    """What came of some requests."""

    finished: int = 0
    unfinished: int = 0
    refused: dict[str, str] = field(default_factory=dict)  # constraint, why
    wrong: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # of the finished outputs
    by_constraint: Counter[str] = field(default_factory=Counter)  # finished outputs

    @property
    def share(self) -> float:
        return self.finished / max(1, self.finished + self.unfinished)


Judge = Callable[[Any, str], "str | None"]
Request = tuple[Constraint, str | None]  # and the text that the model is to want


def run(llm: LLM, requests: Sequence[Request], *, samples: int = 1, max_tokens: int = 160) -> list[RequestOutput]:
    """Outputs at temperature 1; several samples, and strings that end soon, where the model is not led."""
    params = []
    for index, (constraint, text) in enumerate(requests):
        is_json = "json" in constraint or "json_object" in constraint
        params.append(
            SamplingParams(
                temperature=1,
                n=samples if text is None else 1,
                seed=index,
                max_tokens=max_tokens,
                logit_bias=closing_bias() if is_json else {EOS: 4.0},
                logits_processors=None if text is None else [steered(text, by_bytes=index % 2 == 0)],
                guided_decoding=GuidedDecodingParams(**constraint),
            )
        )
    return llm.generate([PROMPT] * len(params), params, use_tqdm=False, on_error="return")


def judged(llm: LLM, requests: Sequence[Request], judge: Judge, **kwargs: Any) -> Tally:
    """Runs requests, and has each finished output judged by its constraint."""
    tally = Tally()
    for (constraint, text), output in zip(requests, run(llm, requests, **kwargs), strict=True):
        kind, source = next(iter(constraint.items()))
        shown = json.dumps(source, ensure_ascii=False) if isinstance(source, (dict, list, bool)) else str(source)
        if output.error is not None:
            assert {one.finish_reason for one in output.outputs} == {"error"}
            if "could not be compiled in" in output.error or "could not build an automaton" in output.error:
                assert constraint["backend"] == "outlines"  # which may need minutes for a few sets beyond ASCII
                continue
            tally.refused[shown] = output.error
            continue
        for one in output.outputs:
            if one.finish_reason != "stop":
                assert one.finish_reason == "length", (one, constraint)
                tally.unfinished += 1
                continue
            tally.finished += 1
            tally.texts.append(one.text)
            tally.by_constraint[shown] += 1
            if (reason := judge(source, one.text)) and (not tally.wrong or f" {shown[:600]}\n" not in tally.wrong[-1]):
                led = "" if text is None else f" while it wanted {text!r}"
                tally.wrong.append(f"{kind} {shown[:600]}\n  allowed {one.text!r}{led}\n  {reason}")
    return tally


def all_right(tally: Tally) -> None:
    assert not tally.wrong, f"{len(tally.wrong)} of {tally.finished} are wrong:\n" + "\n".join(tally.wrong[:20])


def names_what_it_refuses(refused: dict[str, str]) -> None:
    """Refusals name a keyword, or say that nothing is valid."""
    silent = []
    for text, why in refused.items():
        if not (names_keyword(why, json.loads(text)) or says_nothing_matches(why)):
            silent.append(f"{text[:600]}\n  {why}")
    assert not silent, f"{len(silent)} refusals name no keyword:\n" + "\n".join(silent[:20])


# JSON schemas


BACKENDS = ["auto", "xgrammar", "outlines"]  # what these two cannot enforce goes to another


@pytest.mark.parametrize(("backend", "whitespace"), [*itertools.product(BACKENDS, [None]), ("auto", " ?")])
def test_schemas_by_hand(llm: LLM, backend: str, whitespace: str | None) -> None:
    constraints = [
        {"json": schema, "whitespace_pattern": whitespace, "backend": backend}
        for schema in [*PLAIN_CASES.values(), *HARD_CASES.values()]
    ]
    tally = judged(llm, [(constraint, None) for constraint in constraints], complaint, samples=4)
    all_right(tally)
    names_what_it_refuses(tally.refused)
    plain = {json.dumps(schema, ensure_ascii=False): schema for schema in PLAIN_CASES.values()}
    assert not plain.keys() & tally.refused.keys()
    assert tally.share > 0.9 and tally.finished > 4 * len(PLAIN_CASES)
    assert len(tally.refused) < len(HARD_CASES) / 2
    assert not [text for text in plain if not tally.by_constraint[text]]  # of each some have finished


def generated_schemas(llm: LLM, parts: list[tuple[Any, list[str]]], backend: str) -> Tally:
    """Each schema, walked at random and led to some texts."""
    requests: list[Request] = []
    for index, (schema, texts) in enumerate(parts):
        how = {"whitespace_pattern": None if index % 3 == 0 or backend != "auto" else " ?", "backend": backend}
        requests += [({"json": schema, **how}, text) for text in [None, *texts]]
    tally = judged(llm, requests, complaint, samples=3)
    all_right(tally)
    return tally


@st.composite
def schemas_with_texts(draw: Any, plain: bool, num_texts: int = 2) -> tuple[Any, list[str]]:
    schema = draw(schemas(plain))
    return schema, [draw(near_misses(schema)) for _ in range(num_texts)]


def plain_property(llm: LLM, how: settings, backend: str = "auto") -> Counter[str]:
    seen: Counter[str] = Counter()

    @how
    @given(st.lists(schemas_with_texts(plain=True), min_size=8, max_size=16))
    def check(parts: list[tuple[Any, list[str]]]) -> None:
        tally = generated_schemas(llm, parts, backend)
        assert all(keywords(schema) <= PLAIN for schema, _ in parts)
        assert not tally.refused, "\n".join(f"{text[:600]}\n  {why}" for text, why in tally.refused.items())
        seen.update(schemas=len(parts), finished=tally.finished, unfinished=tally.unfinished)

    check()
    return seen


def hard_property(llm: LLM, how: settings, backend: str = "auto") -> Counter[str]:
    seen: Counter[str] = Counter()

    @how
    @given(st.lists(schemas_with_texts(plain=False), min_size=8, max_size=16))
    def check(parts: list[tuple[Any, list[str]]]) -> None:
        tally = generated_schemas(llm, parts, backend)
        names_what_it_refuses(tally.refused)
        for schema, texts in parts:
            if says_nothing_matches(tally.refused.get(json.dumps(schema, ensure_ascii=False), "")):
                assert all(complaint(schema, text) for text in texts), f"{schema} has valid values"
        seen.update(
            schemas=len(parts), finished=tally.finished, unfinished=tally.unfinished, refused=len(tally.refused)
        )

    check()
    return seen


def test_generated_schemas_of_plain_keywords_all_run(llm: LLM) -> None:
    seen = plain_property(llm, FEW)
    assert seen["finished"] > 2 * seen["schemas"] and seen["unfinished"] < seen["finished"] / 10


def test_generated_schemas_of_all_keywords_run_or_are_refused_by_name(llm: LLM) -> None:
    seen = hard_property(llm, FEW)
    assert seen["finished"] > seen["schemas"] and seen["unfinished"] < seen["finished"] / 5
    assert seen["refused"] < 0.6 * seen["schemas"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_generated_schemas(llm: LLM, backend: str) -> None:
    how, at_least = many(backend)
    for seen in (plain_property(llm, how, backend), hard_property(llm, how, backend)):
        print(backend, dict(seen))
        assert seen["finished"] > seen["schemas"] >= at_least


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_wants_invalid_texts_cannot_write_them(llm: LLM, backend: str) -> None:
    requests: list[Request] = []
    for schema, texts in TEMPTATIONS:
        for text in texts:
            requests += [({"json": schema, "backend": backend}, text)] * 2  # in long tokens, and in bytes
    tally = judged(llm, requests, complaint)
    all_right(tally)
    assert tally.share > 0.95


def test_valid_texts_can_be_written(llm: LLM) -> None:
    pairs = [(schema, text) for schema, texts in REACHABLE for text in texts]
    for schema, text in pairs:
        assert complaint(schema, text) is None
    outputs = run(llm, [({"json": schema}, text) for schema, text in pairs])
    missed = [
        f"{schema}\n  {text}\n  {output.error or output.outputs[0].text}"
        for (schema, text), output in zip(pairs, outputs, strict=True)
        if output.outputs[0].text != text
    ]
    assert not missed, "\n".join(missed)


# The forms of a JSON constraint


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def schema_forms() -> list[Any]:
    from pydantic import BaseModel, Field

    class Point(BaseModel):
        x: int = Field(ge=0, le=9)
        colour: Colour = Colour.RED
        parts: list[Point] = Field(default=[], max_length=1)
        note: str | None = Field(default=None, max_length=2)

    schema = Point.model_json_schema()
    return [schema, json.dumps(schema), json.dumps(schema, indent=3), Point]


def test_a_schema_is_a_dict_a_text_or_a_model(llm: LLM) -> None:
    forms = schema_forms()
    params = [
        SamplingParams(temperature=1, seed=3, max_tokens=200, logit_bias=closing_bias(), **{name: made(json=form)})
        for name, made in (("guided_decoding", GuidedDecodingParams), ("structured_outputs", StructuredOutputsParams))
        for form in forms
    ]
    outputs = [output.outputs[0] for output in llm.generate([PROMPT] * len(params), params, use_tqdm=False)]
    assert {one.finish_reason for one in outputs} == {"stop"}
    assert len({one.text for one in outputs}) == 1  # one seed, one schema
    forms[3].model_validate_json(outputs[0].text)


def test_any_json_object(llm: LLM) -> None:
    params = [
        SamplingParams(temperature=1, seed=seed, max_tokens=300, logit_bias=closing_bias(5), **constraint)
        for seed in range(8)
        for constraint in (
            {"guided_decoding": GuidedDecodingParams(json_object=True)},
            {"structured_outputs": StructuredOutputsParams(json_object=True)},
        )
    ]
    outputs = [output.outputs[0] for output in llm.generate([PROMPT] * len(params), params, use_tqdm=False)]
    finished = [one.text for one in outputs if one.finish_reason == "stop"]
    assert len(finished) > 12
    assert all(isinstance(json.loads(text), dict) for text in finished) and len(set(finished)) > 4
    # "no constraint", which JSON would be by chance only
    free = SamplingParams(temperature=1, seed=0, max_tokens=9, guided_decoding=GuidedDecodingParams(json_object=False))
    assert not llm.generate([PROMPT], free, use_tqdm=False)[0].outputs[0].text.startswith("{")


SPACED = {**OBJECT, "properties": {"a": {"type": "array", "items": {"type": "null"}}, "b": {"const": {"c": 1}}}}
SPACED["required"] = ["a", "b"]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"whitespace_pattern": ""}, ""),
        ({"whitespace_pattern": " ?"}, " ?"),
        ({"whitespace_pattern": r"[\n ]{0,2}"}, r"[\n ]{0,2}"),
        ({"whitespace_pattern": r"\s*"}, r"[ \t\r\n]*"),
        ({"disable_any_whitespace": True}, " ?"),
    ],
    ids=str,
)
def test_white_space_is_what_was_asked_for(llm: LLM, options: dict[str, Any], allowed: str) -> None:
    params = [
        SamplingParams(
            temperature=1,
            seed=seed,
            max_tokens=200,
            logit_bias=closing_bias(),
            structured_outputs=StructuredOutputsParams(json=SPACED, **options),
        )
        for seed in range(12)
    ]
    outputs = [output.outputs[0] for output in llm.generate([PROMPT] * len(params), params, use_tqdm=False)]
    finished = [one.text for one in outputs if one.finish_reason == "stop"]
    assert len(finished) > 8
    for text in finished:
        assert complaint(SPACED, text) is None
        assert all(re.fullmatch(allowed, space) for space in re.findall(r"\s+", text)), text
    if "disable_any_whitespace" in options:
        assert all(re.fullmatch(r"(?:[^ ]|(?<=[,:]) )*", text) for text in finished)


@pytest.mark.parametrize(
    ("schema", "open_by_default"),
    [
        ({"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "null"}}}}}, False),
        ({"type": "object", "properties": {"a": True}, "allOf": [{"properties": {"d": {"const": 1}}}]}, True),
    ],
)
def test_objects_have_the_properties_that_are_named(llm: LLM, schema: Any, open_by_default: bool) -> None:
    wanted = '{"a":{"b":null},"e":2}'
    for closed in (False, True):
        params = SamplingParams(
            temperature=1,
            seed=1,
            max_tokens=100,
            logits_processors=[steered(wanted)],
            logit_bias=closing_bias(),
            structured_outputs=StructuredOutputsParams(json=schema, disable_additional_properties=closed),
        )
        text = llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].text
        assert ("e" in json.loads(text)) == (open_by_default and not closed)
        assert complaint(schema, text) is None


# Regular expressions


def full_match(pattern: str, text: str) -> str | None:
    return None if re.fullmatch(pattern, text) else "re.fullmatch says no"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of `re`, for "&&" and the like
def test_regexes_by_hand(llm: LLM, backend: str) -> None:
    requests: list[Request] = []
    for pattern, texts in text_cases.REGEXES.items():
        for text in [None, *texts, *texts]:
            requests.append(({"regex": pattern, "backend": backend}, text))
    outputs = run(llm, requests, samples=4)
    tally = judged(llm, requests, full_match, samples=4)
    all_right(tally)
    assert not tally.refused
    assert tally.share > 0.95
    missed = [
        f"{constraint['regex']!r} does not allow {text!r} but {output.outputs[0].text!r}"
        for (constraint, text), output in zip(requests, outputs, strict=True)
        if text is not None and re.fullmatch(constraint["regex"], text) and output.outputs[0].text != text
    ]
    assert not missed, "\n".join(missed)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_regexes_that_automata_cannot_follow_are_refused_or_right(llm: LLM) -> None:
    requests: list[Request] = []
    for pattern, texts in text_cases.HARD_REGEXES.items():
        requests += [({"regex": pattern}, text) for text in [None, *texts, *texts]]
    tally = judged(llm, requests, full_match, samples=4)
    all_right(tally)
    assert all(len(why) > 20 for why in tally.refused.values())


def test_broken_regexes_are_refused(llm: LLM) -> None:
    requests: list[Request] = [({"regex": pattern}, None) for pattern in text_cases.BROKEN_REGEXES]
    tally = judged(llm, requests, lambda *_: "it ran")
    all_right(tally)
    assert len(tally.refused) == len(requests)


def regex_property(llm: LLM, how: settings, backend: str = "auto") -> Counter[str]:
    seen: Counter[str] = Counter()

    @how
    @given(st.lists(regexes(), min_size=8, max_size=16), st.data())
    def check(patterns: list[str], data: st.DataObject) -> None:
        requests: list[Request] = [({"regex": pattern, "backend": backend}, None) for pattern in patterns]
        for pattern in patterns[:4]:
            requests.append(({"regex": pattern, "backend": backend}, data.draw(st.from_regex(pattern))[:20]))
        tally = judged(llm, requests, full_match, samples=3, max_tokens=80)
        all_right(tally)
        assert not tally.refused
        seen.update(regexes=len(patterns), finished=tally.finished, unfinished=tally.unfinished)

    check()
    return seen


def test_generated_regexes(llm: LLM) -> None:
    seen = regex_property(llm, FEW)
    assert seen["finished"] > 2 * seen["regexes"] and seen["unfinished"] < seen["finished"] / 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_generated_regexes(llm: LLM, backend: str) -> None:
    how, at_least = many(backend)
    seen = regex_property(llm, how, backend)
    print(backend, dict(seen))
    assert seen["finished"] > seen["regexes"] >= at_least


# Choices


def test_every_choice_can_be_chosen_and_nothing_else(llm: LLM) -> None:
    requests: list[Request] = []
    for choices in text_cases.CHOICES:
        requests += [
            ({"choice": choices}, text) for text in [None, *choices[:10], choices[-1], choices[0] + "x", "zzz"]
        ]

    def judge(choices: list[str], text: str) -> str | None:
        return None if text in choices else "no choice"

    tally = judged(llm, requests, judge, samples=4)
    all_right(tally)
    assert not tally.refused and not tally.unfinished
    for (constraint, text), output in zip(requests, run(llm, requests), strict=True):
        if text in constraint["choice"]:
            assert output.outputs[0].text == text


def test_an_empty_choice_is_refused_or_can_be_chosen(llm: LLM) -> None:
    for choices in (["", "x"], ["x", ""]):
        [output] = run(llm, [({"choice": choices}, "")])
        assert output.error is not None and "empty" in output.error or output.outputs[0].text == ""


def test_choices_are_types_too(llm: LLM) -> None:
    for choice, texts in ((Literal["a", "bc"], {"a", "bc"}), (Colour, {"red", "blue"}), ([1, 22], {"1", "22"})):
        params = SamplingParams(n=12, seed=0, guided_decoding=GuidedDecodingParams(choice=choice))  # type: ignore[arg-type]
        assert {one.text for one in llm.generate([PROMPT], params, use_tqdm=False)[0].outputs} == texts


# Grammars


@functools.cache
def parser(grammar: str) -> Any:
    return lark.Lark(grammar, parser="earley", lexer="dynamic_complete")


def parses(grammar: str, text: str) -> str | None:
    try:
        parser(grammar).parse(text)
    except lark.exceptions.LarkError as error:
        return f"Lark says {type(error).__name__}"
    return None


def grammar_requests(cases: Sequence[tuple[str, list[str]]]) -> list[Request]:
    requests: list[Request] = []
    for grammar, texts in cases:
        requests += [({"grammar": grammar}, text) for text in [None, *texts, *texts]]
    return requests


def test_grammars_of_lark(llm: LLM) -> None:
    requests = grammar_requests(list(text_cases.LARK.values()))
    tally = judged(llm, requests, parses, samples=4)
    all_right(tally)
    assert not tally.refused
    assert tally.share > 0.8
    assert len(tally.by_constraint) == len(text_cases.LARK)


def test_what_is_beyond_the_grammars_of_the_backends_is_refused_or_right(llm: LLM) -> None:
    tally = judged(llm, grammar_requests(list(text_cases.HARD_LARK.values())), parses, samples=4)
    all_right(tally)
    assert all("grammar" in why for why in tally.refused.values()), tally.refused


def test_grammars_of_gbnf(llm: LLM) -> None:
    in_lark = {grammar.strip(): meaning for grammar, meaning, _ in text_cases.GBNF.values()}
    requests = grammar_requests([(grammar, texts) for grammar, _, texts in text_cases.GBNF.values()])
    tally = judged(llm, requests, lambda grammar, text: parses(in_lark[grammar.strip()], text), samples=4)
    all_right(tally)
    assert not tally.refused
    assert tally.share > 0.8
    assert len(tally.by_constraint) == len(text_cases.GBNF)


def test_valid_texts_of_grammars_can_be_written(llm: LLM) -> None:
    cases = [(grammar, grammar, texts) for grammar, texts in text_cases.LARK.values()]
    cases += [(grammar, meaning, texts) for grammar, meaning, texts in text_cases.GBNF.values()]
    wanted = [(grammar, text) for grammar, meaning, texts in cases for text in texts[:1] if not parses(meaning, text)]
    assert len(wanted) > 20
    for (grammar, text), output in zip(
        wanted, run(llm, [({"grammar": grammar}, text) for grammar, text in wanted]), strict=True
    ):
        assert output.outputs[0].text == text, grammar


def test_broken_grammars_are_errors_of_their_rows(llm: LLM) -> None:
    requests: list[Request] = [({"grammar": grammar}, None) for grammar in text_cases.BROKEN_GRAMMARS]
    tally = judged(llm, requests, lambda *_: "it ran", max_tokens=60)
    all_right(tally)
    assert len(tally.refused) == len(requests)


# Truncation


@pytest.mark.parametrize(
    "constraint",
    [
        {"json": PLAIN_CASES["nested objects"]},
        {"json": {"const": "a long text that does not fit"}},
        {"regex": "[a-z]{30}"},
        {"choice": ["abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxy"]},
        {"grammar": 'start: "(" start ")" | "x" start "x"'},
    ],
    ids=lambda constraint: next(iter(constraint)),
)
def test_an_output_that_does_not_fit_ends_with_length(llm: LLM, constraint: Constraint) -> None:
    [whole] = run(llm, [(constraint, None)], max_tokens=100)
    for max_tokens in (1, 2, 3):
        [cut] = run(llm, [(constraint, None)], max_tokens=max_tokens)
        assert [one.finish_reason for one in cut.outputs] == ["length"]
        assert cut.outputs[0].token_ids == whole.outputs[0].token_ids[:max_tokens]


def test_the_last_token_may_be_the_one_that_ends(llm: LLM) -> None:
    """An output is complete with its last token of text, yet "stop" needs the stop token: one more."""
    params = SamplingParams(
        temperature=1, seed=1, max_tokens=100, guided_decoding=GuidedDecodingParams(regex="[ab]{5}")
    )
    [whole] = llm.generate([PROMPT], params, use_tqdm=False)
    needed = len(whole.outputs[0].token_ids)
    for max_tokens, reason in ((needed, "stop"), (needed - 1, "length")):
        params.max_tokens = max_tokens
        [output] = llm.generate([PROMPT], params, use_tqdm=False)
        assert output.outputs[0].finish_reason == reason
        assert re.fullmatch("[ab]{5}", output.outputs[0].text)


# Tokenizers of other kinds


def sentencepiece(tmp_path: Path) -> LLM:
    from tests.tiny_tokenizers import sentencepiece_tokenizer

    folder = save_model(tmp_path / "sentencepiece", sentencepiece_tokenizer(), eos_token_id=2)
    return LLM(str(folder), dtype="float32", kv_cache_memory_bytes=4 << 20)


def test_tokens_of_sentencepiece(tmp_path: Path) -> None:
    """Byte fallback, and tokens that begin with a space, the first of which the tokenizer may drop."""
    patterns = [r"[a-h]{3,5}", r"[ab] [ab]", "é日😀|éa", r"[ab ]{4}x", r"[^ ]{2}", "he he", r"\w \w{2}"]
    with sentencepiece(tmp_path) as llm:
        params = [
            SamplingParams(temperature=1, n=6, seed=seed, max_tokens=60, guided_decoding=GuidedDecodingParams(regex=p))
            for seed, p in enumerate(patterns)
        ]
        outputs = llm.generate([[5, 6]] * len(patterns), params, use_tqdm=False)
        for pattern, output in zip(patterns, outputs, strict=True):
            for one in output.outputs:
                assert one.finish_reason == "stop" and re.fullmatch(pattern, one.text), (pattern, one)
        schemas_ = [PLAIN_CASES[name] for name in ("optional keys", "unicode keys", "enum", "recursive list", "tuple")]
        params = [
            SamplingParams(temperature=1, n=4, seed=0, max_tokens=200, guided_decoding=GuidedDecodingParams(json=one))
            for one in schemas_
        ]
        outputs = llm.generate([[5, 6]] * len(schemas_), params, use_tqdm=False)
        finished = 0
        for schema, output in zip(schemas_, outputs, strict=True):
            for one in output.outputs:
                if one.finish_reason == "stop":
                    finished += 1
                    assert complaint(schema, one.text) is None, (schema, one.text)
        assert finished > 12
    gc.collect()
