"""Constraints together with everything else: other ways to sample, other sizes of the engine, other rows of the batch.

A row's tokens depend on nothing but the row: here they are compared with those of the row run alone.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from taco import LLM, SamplingParams
from taco.errors import BatchValidationError, TacoValidationError
from taco.outputs import RequestOutput
from taco.sampling_params import BeamSearchParams, GuidedDecodingParams, StructuredOutputsParams
from taco.worker.sampler.sampler import Sampler

from . import text_cases
from .oracle import complaint
from .random_model import EOS, PROMPT, closing_bias, save_model, tokenizer
from .schema_cases import PLAIN_CASES

MAX_LEN = 128
QUIET: dict[str, Any] = {"use_tqdm": False}
Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("random-llama"))


@pytest.fixture(scope="module")
def make(folder: Path) -> Make:
    def make(**kwargs: Any) -> LLM:
        defaults = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20, "max_num_seqs": 16, "swap_space": 0.01}
        return LLM(str(folder), **{**defaults, "max_model_len": MAX_LEN, "max_logprobs": 400, **kwargs})

    return make


@pytest.fixture(scope="module")
def llm(make: Make) -> Iterator[LLM]:
    with make() as llm:
        yield llm


def guided(**constraint: Any) -> GuidedDecodingParams:
    return GuidedDecodingParams(**constraint)


FORCED = {"type": "object", "properties": {"a fixed key": {"const": "a fixed value"}, "b": {"type": "boolean"}}}
FORCED |= {"required": ["a fixed key", "b"], "additionalProperties": False}
PHONE = r"\(\d{3}\) \d{3}-\d{4}"
BIAS = closing_bias()


def rows() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of many lengths, some of which begin alike; constraints of every kind, and none."""
    constraints: list[dict[str, Any]] = [
        {"guided_decoding": guided(json=FORCED)},
        {"guided_decoding": guided(json=PLAIN_CASES["recursive list"], whitespace_pattern=" ?")},
        {"guided_decoding": guided(json=PLAIN_CASES["recursive expression"])},
        {"guided_decoding": guided(json=PLAIN_CASES["optional keys"])},
        {"guided_decoding": guided(json=PLAIN_CASES["long enum"])},
        {"structured_outputs": StructuredOutputsParams(json=PLAIN_CASES["unicode keys"])},
        {"guided_decoding": guided(regex=PHONE)},
        {"guided_decoding": guided(regex=r"(?:[^\x00-\x7f]|ab){4,9}")},
        {"guided_decoding": guided(choice=text_cases.CHOICES[0])},
        {"guided_decoding": guided(choice=[f"a long way to item {i}" for i in range(40)])},
        {"guided_decoding": guided(grammar=text_cases.ARITHMETIC)},
        {"guided_decoding": guided(grammar=text_cases.GBNF["list"][0])},
        {"guided_decoding": guided(json_object=True)},
        {},
    ]
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 20},
        {"presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"top_p": 0.9, "min_p": 0.01},
        {"min_tokens": 6, "logprobs": 2},
        {"logprobs": 0},
    ]
    found = []
    prefix = [5 + (7 * i) % 250 for i in range(40)]
    for index, (constraint, way) in enumerate(zip(constraints * 3, itertools.cycle(ways), strict=False)):
        prompt = [*prefix[: index % 41], 5 + index % 250, 9]
        params = {"temperature": 1, "seed": index, "max_tokens": 60, "logit_bias": BIAS if index % 3 else None}
        found.append((prompt, SamplingParams(**{**params, **way, **copy.deepcopy(constraint)})))
    return found


def run(llm: LLM, given: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    return llm.generate([prompt for prompt, _ in given], [params for _, params in given], **QUIET)


def result(output: RequestOutput) -> list[Any]:
    return [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in output.outputs]


@pytest.fixture(scope="module")
def alone(make: Make) -> list[list[Any]]:
    """Each row by itself, in an engine that has seen nothing of the others' prompts."""
    with make(enable_prefix_caching=False) as llm:
        return [result(run(llm, [row])[0]) for row in rows()]


def test_the_rows_are_worth_comparing(alone: list[list[Any]]) -> None:
    reasons = Counter(reason for row in alone for _, _, reason, _ in row)
    assert reasons["stop"] > len(alone) / 2 and reasons["length"] > 2
    assert len({text for row in alone for _, text, _, _ in row}) > 0.8 * len(alone)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_seqs": 3, "max_num_batched_tokens": 8},
        {"max_num_seqs": 5, "max_num_batched_tokens": 6, "async_scheduling": True},
        {"enable_prefix_caching": False, "disable_async_output_proc": True, "block_size": 8},
        {"num_gpu_blocks_override": 10, "preemption_mode": "recompute"},
        {"num_gpu_blocks_override": 10, "preemption_mode": "swap"},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_the_batch(make: Make, alone: list[list[Any]], limits: dict[str, Any]) -> None:
    with make(**limits) as llm:
        given = rows()
        for _ in range(
            2
        ):  # the second time prompts are found in the prefix cache, and grammars among the compiled ones
            assert list(map(result, run(llm, given))) == alone
            given = given[::-1]
            alone = alone[::-1]
        assert (llm.llm_engine.scheduler.num_preemptions > 0) == ("num_gpu_blocks_override" in limits)


def test_tokens_do_not_depend_on_forced_ones(
    make: Make, alone: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[int] = []
    with make() as llm:
        take = Sampler.take_forced

        def counting(self: Any, row: int) -> list[int]:
            found: list[int] = take(self, row)
            forced.append(len(found))
            return found

        monkeypatch.setattr(Sampler, "take_forced", counting)
        assert list(map(result, run(llm, rows()))) == alone
        assert sum(forced) > 100
        monkeypatch.setattr(Sampler, "take_forced", lambda self, row: [])
        assert list(map(result, run(llm, rows()))) == alone


# Other ways to sample


def judge(params: SamplingParams, text: str) -> str | None:
    constraint = params.guided_decoding
    assert constraint is not None
    if constraint.json is not None:
        return complaint(constraint.json, text)
    if constraint.regex is not None:
        return None if re.fullmatch(constraint.regex, text) else "no match"
    assert constraint.choice is not None
    return None if text in constraint.choice else "no choice"


JUDGED = [
    {"json": PLAIN_CASES["recursive list"], "whitespace_pattern": ""},
    {"json": PLAIN_CASES["optional keys"], "whitespace_pattern": " ?"},
    {"json": FORCED},
    {"json": PLAIN_CASES["enum"]},
    {"regex": PHONE},
    {"regex": "(?:ab|é|日){1,4}x?"},
    {"choice": ["a", "ab", "abc", "b", "é"]},
]


def judged(llm: LLM, **kwargs: Any) -> list[RequestOutput]:
    """Outputs under each of several constraints, of which those that finished are right and are most of them."""
    params = [
        SamplingParams(**{"temperature": 1, "seed": seed, "max_tokens": 90, **kwargs}, guided_decoding=guided(**one))
        for seed, one in enumerate(JUDGED)
    ]
    outputs = llm.generate([PROMPT] * len(params), params, **QUIET)
    reasons: Counter[str | None] = Counter()
    for one_params, output in zip(params, outputs, strict=True):
        for one in output.outputs:
            reasons[one.finish_reason] += 1
            if one.finish_reason == "stop" and one.stop_reason is None:
                assert judge(one_params, one.text) is None, (one_params.guided_decoding, one.text)
    assert reasons["stop"] > 0.7 * reasons.total(), reasons
    return outputs


def test_several_samples(llm: LLM) -> None:
    outputs = judged(llm, n=8)
    assert all([one.index for one in output.outputs] == list(range(8)) for output in outputs)
    assert len({one.text for one in outputs[0].outputs}) > 3


def test_the_best_of_several(llm: LLM) -> None:
    all_of_them, best = judged(llm, n=6, logprobs=0), judged(llm, n=2, best_of=6, logprobs=0)
    for several, two in zip(all_of_them, best, strict=True):
        assert len(two.outputs) == 2
        scores = [one.cumulative_logprob for one in two.outputs]
        assert scores == sorted(scores, reverse=True)
        ranked = sorted(several.outputs, key=lambda one: -one.cumulative_logprob)  # type: ignore[operator]
        assert scores == pytest.approx([one.cumulative_logprob for one in ranked[:2]], abs=1e-5)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_beam_search_of_sampling(llm: LLM, early_stopping: bool | str) -> None:
    outputs = judged(llm, temperature=0, n=3, best_of=4, use_beam_search=True, early_stopping=early_stopping, seed=None)
    for output in outputs:
        assert len({tuple(one.token_ids) for one in output.outputs}) == len(output.outputs) == 3


def test_a_wide_beam_finds_the_likeliest_choices(llm: LLM) -> None:
    """With as many beams as there are choices, all of them come, each once, the likeliest first."""
    choices = ["a", "ab", "abc", "b", "é", "日本", "日"]
    params = SamplingParams(
        temperature=0,
        n=len(choices),
        best_of=64,
        use_beam_search=True,
        max_tokens=12,
        guided_decoding=guided(choice=choices),
    )
    [output] = llm.generate([PROMPT], params, **QUIET)
    assert {one.text for one in output.outputs} <= set(choices)
    assert output.outputs[0].finish_reason == "stop"


def test_beam_search(llm: LLM) -> None:
    for constraint in JUDGED:
        structured = StructuredOutputsParams(**constraint)
        params = BeamSearchParams(beam_width=4, max_tokens=90, structured_outputs=structured)
        [output] = llm.beam_search([{"prompt_token_ids": PROMPT}], params)
        assert len(output.sequences) == 4
        checked = 0
        for one in output.sequences:
            assert one.text is not None
            if one.tokens[-1] == EOS:
                checked += 1
                text = tokenizer().decode(one.tokens[len(PROMPT) :], skip_special_tokens=True)
                assert judge(SamplingParams(guided_decoding=guided(**constraint)), text) is None, text
        assert checked >= 2 or "json" in constraint


def test_at_least_so_many_tokens_as_far_as_the_constraint_has_them(llm: LLM) -> None:
    outputs = judged(llm, min_tokens=7)
    assert len(outputs[6].outputs[0].token_ids) < 7  # a short choice: nothing may follow it
    params = SamplingParams(seed=0, min_tokens=9, max_tokens=60, guided_decoding=guided(regex="a*"), n=8)
    for one in llm.generate([PROMPT], params, **QUIET)[0].outputs:
        assert re.fullmatch("a*", one.text) and len(one.token_ids) >= 9
    # The end counts where it is allowed: a* may end at once, and without min_tokens some samples do early.
    params.min_tokens = 0
    params.logit_bias = {EOS: 4.0}
    assert min(len(one.token_ids) for one in llm.generate([PROMPT], params, **QUIET)[0].outputs) < 9


def test_the_end_comes_even_if_the_model_must_not_end(llm: LLM) -> None:
    outputs = judged(llm, ignore_eos=True)
    assert outputs[2].outputs[0].finish_reason == "stop"


def test_without_any_stop_token_no_text_could_end(tmp_path: Path) -> None:
    made = copy.deepcopy(tokenizer())
    made.eos_token = None
    with LLM(str(save_model(tmp_path, made, eos_token_id=None)), dtype="float32", kv_cache_memory_bytes=1 << 20) as llm:
        params = SamplingParams(temperature=0, guided_decoding=guided(choice=["ab"]))
        with pytest.raises(TacoValidationError, match="no end-of-sequence token: pass stop_token_ids"):
            llm.generate([PROMPT], params, **QUIET)
        params.stop_token_ids = [2]
        one = llm.generate([PROMPT], params, **QUIET)[0].outputs[0]
        assert (one.text, one.finish_reason, one.stop_reason) == ("ab", "stop", 2)


@pytest.mark.parametrize("included", [False, True])
def test_stop_texts(llm: LLM, included: bool) -> None:
    free = judged(llm)
    cut = judged(llm, stop=['"', "-", "é"], include_stop_str_in_output=included)
    for whole, part in zip(free, cut, strict=True):
        text = whole.outputs[0].text
        places = [(text.find(stop), stop) for stop in ('"', "-", "é") if stop in text]
        one = part.outputs[0]
        if not places:
            assert one.text == text and one.stop_reason is None
            continue
        place, stop = min(places)
        assert one.text == text[: place + len(stop) * included]
        assert (one.finish_reason, one.stop_reason) == ("stop", stop)
        assert whole.outputs[0].token_ids[: len(one.token_ids)] == one.token_ids


def test_objects_of_many_optional_properties(llm: LLM) -> None:
    schema = {"type": "object", "properties": {f"key {i}": {"type": ["integer", "null"]} for i in range(1500)}}
    params = [
        SamplingParams(temperature=1, seed=seed, max_tokens=100, guided_decoding=guided(json=schema), logit_bias=BIAS)
        for seed in range(4)
    ]
    for output in llm.generate([PROMPT] * 4, params, **QUIET):
        assert output.outputs[0].finish_reason == "length" or complaint(schema, output.outputs[0].text) is None


def test_a_long_text_without_alternatives_does_not_hold_up_the_others(llm: LLM) -> None:
    """Finding forced tokens takes time, so there are no more of them than the output may have, and some in one step."""
    for max_tokens in (1, 24, 100):
        params = [
            SamplingParams(temperature=1, seed=1, max_tokens=max_tokens, guided_decoding=guided(**constraint))
            for constraint in ({"regex": "y{50000}"}, {"json": {"const": "y" * 9000}})
        ]
        began = time.process_time()
        outputs = [output.outputs[0] for output in llm.generate([PROMPT] * 2, params, **QUIET)]
        assert time.process_time() - began < 30  # the whole text would take minutes
        assert [(len(one.token_ids), one.finish_reason) for one in outputs] == [(max_tokens, "length")] * 2
        assert re.fullmatch("y+", outputs[0].text)


def test_stop_tokens_end_complete_texts_only(llm: LLM) -> None:
    """A stop token that is text cannot be drawn as such, and ends the text where it is complete."""
    tilde, pad = tokenizer().convert_tokens_to_ids("~"), 2
    bias = {tilde: 6.0, pad: 6.0, **BIAS}
    outputs = judged(llm, n=6, stop_token_ids=[tilde, pad], logit_bias=bias)
    judged(llm, n=6, logit_bias=bias)
    outputs = [
        *outputs,
        *llm.generate(
            [PROMPT],
            SamplingParams(
                n=20, seed=1, max_tokens=20, stop_token_ids=[tilde, pad], guided_decoding=guided(regex="[a~]{3,5}")
            ),
            **QUIET,
        ),
    ]
    reasons = Counter(one.stop_reason for output in outputs for one in output.outputs)
    assert reasons[tilde] and reasons[pad]
    for one_constraint, output in zip([*JUDGED, {"regex": "a{3,5}"}], outputs, strict=True):
        for one in output.outputs:
            if one.finish_reason == "stop":
                text = tokenizer().decode(one.token_ids[:-1])
                assert judge(SamplingParams(guided_decoding=guided(**one_constraint)), text) is None, (text, one)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 1.5},
        {"repetition_penalty": 0.5},
        {"no_repeat_ngram_size": 40},
        {"top_k": 1},
        {"top_k": 3},
        {"top_p": 0.1},
        {"min_p": 0.5},
        {"temperature": 0},
        {"temperature": 5},
        {"logit_bias": {5: 100, 60: 100, EOS: 100, 2: 100}},
        {"logit_bias": {EOS: -100, 5: 30}},
        {"bad_words": ["xyz", "~~"]},
        {"logits_processors": [lambda token_ids, logits: -logits]},
    ],
    ids=lambda kwargs: ", ".join(kwargs),
)
def test_texts_are_valid_whatever_else_changes_the_odds(llm: LLM, kwargs: dict[str, Any]) -> None:
    judged(llm, **kwargs)


@pytest.mark.parametrize(
    "kwargs", [{"logprobs": 3}, {"logprobs": 0}, {"logprobs": -1}, {"prompt_logprobs": 2}], ids=str
)
def test_tokens_are_the_same_with_and_without_log_probabilities(llm: LLM, kwargs: dict[str, Any]) -> None:
    for without, with_ in zip(judged(llm), judged(llm, **kwargs), strict=True):
        one = with_.outputs[0]
        assert result(without) == result(with_)
        if "logprobs" in kwargs:
            assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids)
            own = [row[token].logprob for row, token in zip(one.logprobs, one.token_ids, strict=True)]
            assert all(math.isfinite(number) and number <= 0 for number in own)
            assert one.cumulative_logprob == pytest.approx(sum(own))


def test_tokens_are_drawn_with_their_odds_among_the_allowed(llm: LLM) -> None:
    letters = ["a", "b", "c", "d", "é", "日"]
    firsts = [tokenizer().encode(letter, add_special_tokens=False)[0] for letter in letters]
    assert len(set(firsts)) == len(firsts)
    count = 3000
    constraint = guided(regex="|".join(letters))
    for kwargs, kept in (({}, 6), ({"temperature": 0.5}, 6), ({"top_k": 3}, 3), ({"top_k": 1}, 1)):
        params = SamplingParams(seed=4, max_tokens=1, logprobs=-1)
        row = llm.generate([PROMPT], params, **QUIET)[0].outputs[0].logprobs[0]  # type: ignore[index]
        temperature = kwargs.get("temperature", 1)
        weights = {token: math.exp(row[token].logprob / temperature) for token in firsts}
        if "top_k" in kwargs:  # of the allowed ones
            weights = dict(sorted(weights.items(), key=lambda item: -item[1])[:kept])
        total = sum(weights.values())
        params = SamplingParams(seed=4, n=count, max_tokens=1, guided_decoding=constraint, **kwargs)  # type: ignore[arg-type]
        drawn = Counter(one.token_ids[0] for one in llm.generate([PROMPT], params, **QUIET)[0].outputs)
        assert set(drawn) <= set(weights)
        for token, weight in weights.items():
            share = weight / total
            sigma = math.sqrt(count * share * (1 - share))
            assert abs(drawn[token] - count * share) <= 5 * sigma + 1e-9, (kwargs, token, drawn, weights)


def test_samples_with_seeds_are_repeated_and_others_differ(llm: LLM) -> None:
    constraint = guided(regex="[a-z]{12}")
    same = [SamplingParams(seed=5, guided_decoding=constraint) for _ in range(3)]
    texts = [output.outputs[0].text for output in llm.generate([PROMPT] * 3, same, **QUIET)]
    assert len(set(texts)) == 1
    others = [SamplingParams(seed=seed, guided_decoding=constraint) for seed in range(20)]
    assert len({output.outputs[0].text for output in llm.generate([PROMPT] * 20, others, **QUIET)}) == 20


def test_what_other_parameters_leave_nothing_of_is_an_error_of_its_row(llm: LLM) -> None:
    x = tokenizer().convert_tokens_to_ids("x")
    params = [
        SamplingParams(seed=0, guided_decoding=guided(regex="[ab]{3}"), allowed_token_ids=[x]),
        SamplingParams(seed=0, guided_decoding=guided(choice=["ab"])),
        SamplingParams(seed=0, guided_decoding=guided(choice=["a"]), bad_words=["a"]),
    ]
    outputs = llm.generate([PROMPT] * 3, params, **QUIET, on_error="return")
    assert outputs[1].error is None and outputs[1].outputs[0].text == "ab"
    for bad in (outputs[0], outputs[2]):
        assert bad.error is not None and bad.outputs[0].finish_reason == "error"


# Valid and broken constraints in one batch


BROKEN: list[dict[str, Any]] = [
    {"json": "{"},
    {"json": {"type": "strin"}},
    {"json": {"$ref": "#/nowhere"}},
    {"json": {"$ref": "https://example.com/other.json"}},
    {"json": {"type": "object", "properties": []}},
    {"json": {"minimum": "3"}},
    {"json": {"required": "a"}},
    {"json": {"enum": []}},
    {"json": {"type": "string", "pattern": "("}},
    {"json": {"type": "integer", "minimum": 4, "maximum": 3}},
    {"json": {"not": {"type": "string"}}},
    {"json": {"type": "array", "uniqueItems": True}},
    {"json": [1]},
    {"json": ""},
    {"json": 7},
    {"regex": "("},
    {"regex": ""},
    {"regex": "(?=a)b"},
    {"regex": 7},
    {"regex": "a\0"},
    {"choice": []},
    {"choice": "ab"},
    {"choice": [["a"]]},
    {"grammar": ""},
    {"grammar": "start: nothing"},
    {"grammar": "root ::= nothing"},
    {"grammar": "no grammar at all"},
    {"grammar": 'start: "a'},
    {"grammar": 'root ::= "a'},
    {"choice": ["a"], "backend": "nobody"},
    {"json": {"type": "string"}, "whitespace_pattern": "("},
]


def mixed(num_rows: int) -> tuple[list[SamplingParams], set[int]]:
    """Parameters of rows, every third of which is broken, and the indexes of those."""
    good = itertools.cycle(params for _, params in rows())
    broken = itertools.cycle(BROKEN)
    params, bad = [], set()
    for index in range(num_rows):
        if index % 3 == 1:
            bad.add(index)
            params.append(SamplingParams(seed=index, guided_decoding=guided(**copy.deepcopy(next(broken)))))
        else:
            one = copy.copy(next(good))
            one.seed = index
            one.max_tokens = 12
            params.append(one)
    return params, bad


def check_mixed(llm: LLM, num_rows: int) -> None:
    params, bad = mixed(num_rows)
    outputs = llm.generate([PROMPT] * num_rows, params, **QUIET, on_error="return")
    assert {index for index, output in enumerate(outputs) if output.error is not None} == bad
    for index in bad:
        assert [one.finish_reason for one in outputs[index].outputs] == ["error"]
        assert len(outputs[index].error or "") > 10
    good = [index for index in range(num_rows) if index not in bad]
    without = llm.generate([PROMPT] * len(good), [params[index] for index in good], **QUIET)
    assert [result(outputs[index]) for index in good] == list(map(result, without))


def test_broken_rows_do_not_touch_the_others(llm: LLM) -> None:
    check_mixed(llm, 200)


@pytest.mark.slow
def test_thousands_of_broken_rows_do_not_touch_the_others(llm: LLM) -> None:
    check_mixed(llm, 10_000)


def test_one_error_names_all_broken_rows_before_any_work(llm: LLM) -> None:
    params, bad = mixed(90)
    calls: list[int] = []

    def spy(token_ids: Any, logits: Any) -> Any:
        calls.append(1)
        return logits

    for index in range(0, 90, 3):
        params[index].logits_processors = [spy]
    with pytest.raises(BatchValidationError) as caught:
        llm.generate([PROMPT] * 90, params, **QUIET)
    assert set(caught.value.errors) == bad and not calls
    for index in bad:
        assert caught.value.errors[index]
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_broken_row_alone_is_its_own_error(llm: LLM) -> None:
    for constraint in BROKEN:
        with pytest.raises(TacoValidationError) as caught:
            llm.generate([PROMPT], SamplingParams(guided_decoding=guided(**copy.deepcopy(constraint))), **QUIET)
        assert not isinstance(caught.value, BatchValidationError)
        assert isinstance(caught.value, ValueError) and len(str(caught.value)) > 10


def test_one_broken_constraint_for_all_rows_is_said_once(llm: LLM) -> None:
    with pytest.raises(TacoValidationError) as caught:
        llm.generate([PROMPT] * 5, SamplingParams(guided_decoding=guided(regex="(")), **QUIET)
    assert str(caught.value).count("regular expression") == 1


def test_the_caller_s_parameters_stay_as_they_are(llm: LLM) -> None:
    schema = json.loads(json.dumps(FORCED))
    params = SamplingParams(seed=1, max_tokens=60, guided_decoding=guided(json=schema))
    before = copy.deepcopy(params)
    first = llm.generate([PROMPT], params, **QUIET)
    assert params == before and schema == FORCED
    assert list(map(result, llm.generate([PROMPT], params, **QUIET))) == list(map(result, first))
