from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taco.errors import EngineError, TacoValidationError, UnsupportedFeatureError
from taco.logprobs import FlatLogprobs, Logprob
from taco.outputs import (
    BeamSearchInstance,
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    PoolingRequestOutput,
    RequestError,
    RequestMetrics,
    RequestOutput,
)


def output(completions: list[CompletionOutput], finished: bool = False, **others: Any) -> RequestOutput:
    return RequestOutput("0", "Hi", [1, 2], None, completions, finished, **others)


def state(result: RequestOutput) -> list[tuple[Any, ...]]:
    return [
        (c.index, c.text, c.token_ids, list(c.logprobs or ()), c.cumulative_logprob, c.finish_reason, c.stop_reason)
        for c in result.outputs
    ]


@given(
    st.lists(st.lists(st.text(max_size=3), min_size=2, max_size=2), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
)
def test_adding_deltas_gives_the_cumulative_output(steps: list[list[str]], flat: bool, with_logprobs: bool) -> None:
    def completion(index: int, texts: list[str], first: int, last: bool) -> CompletionOutput:
        ids = list(range(first, first + len(texts)))
        logprobs: Any = None
        if with_logprobs:
            logprobs = FlatLogprobs() if flat else []
            logprobs.extend({i: Logprob(-float(i))} for i in ids)
        total = -float(sum(range(first + len(texts)))) if with_logprobs else None
        end: tuple[str | None, str | None] = ("stop", "x") if last else (None, None)
        return CompletionOutput(index, "".join(texts), ids, total, logprobs, *end)

    merged: RequestOutput | None = None
    for position, texts in enumerate(steps):
        last = position == len(steps) - 1
        delta = output([completion(i, [texts[i]], position, last) for i in range(2)], last)
        if merged is None:
            merged = delta
        else:
            merged.add(delta, aggregate=True)
    assert merged is not None and merged.finished
    whole = output([completion(i, [texts[i] for texts in steps], 0, True) for i in range(2)], True)
    assert state(merged) == state(whole)
    if with_logprobs:
        assert isinstance(merged.outputs[0].logprobs, FlatLogprobs if flat else list)


def test_without_aggregation_the_following_completion_replaces_the_earlier_one() -> None:
    result = output([CompletionOutput(0, "a", [1], None, None)])
    result.add(output([CompletionOutput(0, "ab", [1, 2], None, None, "length")], True), aggregate=False)
    assert state(result) == [(0, "ab", [1, 2], [], None, "length", None)]
    assert result.finished


def test_completions_are_matched_by_index_and_new_ones_are_taken_over() -> None:
    result = output([CompletionOutput(1, "b", [1], None, None)])
    metrics = RequestMetrics(1.0, 2.0, None, None, None)
    following = [CompletionOutput(0, "a", [5], None, None), CompletionOutput(1, "c", [2], None, None)]
    result.add(output(following, metrics=metrics), aggregate=True)
    assert [(c.index, c.text) for c in result.outputs] == [(1, "bc"), (0, "a")]
    assert result.metrics is metrics
    assert not result.finished
    result.add(output([]), aggregate=True)
    assert result.metrics is metrics  # an output that says nothing about it does not erase it


def test_a_finished_output_stays_finished_and_errors_are_taken_over() -> None:
    result = output([], finished=True)
    result.add(output([], error="too long"), aggregate=True)
    assert result.finished and result.error == "too long"


def test_unknown_keywords_are_refused() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        output([], nonsense=1)


def test_finished_is_having_a_finish_reason() -> None:
    assert not CompletionOutput(0, "", [], None, None).finished()
    assert CompletionOutput(0, "", [], None, None, finish_reason="error").finished()


def test_reprs_are_those_of_0_6() -> None:
    completion = CompletionOutput(0, "a'b", [5], None, None, "stop", 7)
    shown = (
        """CompletionOutput(index=0, text="a'b", token_ids=[5], cumulative_logprob=None, logprobs=None, """
        "finish_reason=stop, stop_reason=7)"
    )
    assert repr(completion) == shown
    assert repr(output([completion], True, num_cached_tokens=1)) == (
        "RequestOutput(request_id=0, prompt='Hi', prompt_token_ids=[1, 2], encoder_prompt=None, "
        f"encoder_prompt_token_ids=None, prompt_logprobs=None, outputs=[{shown}], finished=True, metrics=None, "
        "lora_request=None, num_cached_tokens=1, multi_modal_placeholders={})"
    )
    assert repr(output([], error="bad row")).endswith("multi_modal_placeholders={}, error='bad row')")


def test_new_makes_one_completion() -> None:
    result = RequestOutput.new("3", "p", [1], "text", [2, 3], finished=True)
    assert (result.request_id, result.prompt, result.prompt_token_ids, result.finished) == ("3", "p", [1], True)
    assert state(result) == [(0, "text", [2, 3], [], None, None, None)]


def test_outputs_can_be_pickled() -> None:
    result = output([CompletionOutput(0, "a", [5], -1.0, [{5: Logprob(-1.0, 1, "a")}])], True)
    assert repr(pickle.loads(pickle.dumps(result))) == repr(result)


def test_metrics_of_both_naming_schemes_agree() -> None:
    metrics = RequestMetrics(10.0, 14.0, 11.0, 12.5, 1.0, finished_time=14.5)
    assert (metrics.queued_ts, metrics.scheduled_ts) == (10.0, 11.0)
    assert (metrics.first_token_ts, metrics.last_token_ts, metrics.first_token_latency) == (12.5, 14.0, 2.5)
    unscheduled = RequestMetrics(10.0, 10.0, None, None, None)
    assert (unscheduled.scheduled_ts, unscheduled.first_token_ts, unscheduled.first_token_latency) == (0.0, 0.0, 0.0)


def test_beam_search_sequences_need_only_tokens_and_logprobs() -> None:
    sequence = BeamSearchSequence([1, 2], [{2: Logprob(-0.5)}], np.float32(0.0))
    with pytest.raises(TacoValidationError, match="cum_logprob must be a number.*pass them by name"):
        BeamSearchSequence("a", [1, 2], [])  # type: ignore[arg-type]
    assert (sequence.cum_logprob, sequence.text, sequence.finish_reason) == (0.0, None, None)
    assert BeamSearchOutput([sequence]).sequences == [sequence]


def test_beam_search_sequences_can_be_continued() -> None:
    sequence = BeamSearchSequence([1, 2], [], orig_prompt={"prompt": "a", "cache_salt": "s"})
    assert sequence.get_prompt() == {"prompt_token_ids": [1, 2], "cache_salt": "s"}
    assert sequence.get_prompt()["prompt_token_ids"] is not sequence.tokens
    assert BeamSearchSequence([1], [], orig_prompt="a").get_prompt() == {"prompt_token_ids": [1]}


def test_a_search_begins_with_the_prompt() -> None:
    older = BeamSearchInstance([1, 2])
    newer = BeamSearchInstance(prompt={"prompt_token_ids": [1, 2]}, priority=3, cum_logprob=-1.0)
    [first], [second] = older.beams, newer.beams
    assert first.tokens == second.tokens == [1, 2] and first.logprobs == older.completed == []
    assert (newer.priority, second.cum_logprob, second.get_prompt()) == (3, -1.0, {"prompt_token_ids": [1, 2]})
    for wrong in ({}, {"prompt": "text"}, {"prompt_tokens": [1], "prompt": [1]}):
        with pytest.raises(TacoValidationError, match="prompt"):
            BeamSearchInstance(**wrong)


@pytest.mark.parametrize(
    ("code", "error"), [("validation", TacoValidationError), ("internal", EngineError), ("", EngineError)]
)
def test_request_errors_are_exceptions_of_the_caller_or_of_the_engine(code: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="why"):
        raise RequestError(code, "why").to_exception()


@pytest.mark.parametrize(
    "call",
    [
        lambda: RequestOutput.from_seq_group(None, use_cache=False, seq_id_to_seq_group={}),
        lambda: PoolingRequestOutput.from_seq_group(None),
    ],
)
def test_there_are_no_sequence_groups(call: Callable[[], object]) -> None:
    with pytest.raises(UnsupportedFeatureError, match="no sequence groups"):
        call()
