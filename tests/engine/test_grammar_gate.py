"""Requests wait for their grammars without holding anybody up; tokens that are forced take no steps."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taco import LLM, SamplingParams
from taco.engine import llm_engine
from taco.errors import BatchValidationError, TacoError
from taco.sampling_params import BeamSearchParams, GuidedDecodingParams, StructuredOutputsParams
from tests.entrypoints.conftest import tiny_llama_path  # noqa: F401
from tests.guided.toy import Edges, ToyBackend, ToyBackends, automaton

QUIET: dict[str, Any] = {"use_tqdm": False}
PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}
EOS = 1
CHOICE: Edges = {0: {40: 1, 50: 1, 60: 1}, 1: {70: 2, 71: 2}, 2: {}}
CHAIN: Edges = {i: {100 + i: i + 1} for i in range(10)} | {10: {40: 11, 50: 11}, 11: {60: 12}, 12: {}}


@pytest.fixture(scope="module")
def backend() -> ToyBackend:
    return ToyBackend()


@pytest.fixture(scope="module")
def llm(tiny_llama_path: Path, backend: ToyBackend) -> Iterator[LLM]:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_engine, "_open_backends", lambda vocab_size, tokenizer: ToyBackends(backend))
        options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory_bytes": 2 << 20, "max_num_seqs": 8}
        with LLM(str(tiny_llama_path), **options) as llm:
            yield llm


def guided(edges: Edges, final: list[int], max_tokens: int = 30, temperature: float = 0, **options: Any) -> Any:
    fields = {name: options.pop(name) for name in ("seconds", "late", "broken", "bug", "fails_at") if name in options}
    constraint = GuidedDecodingParams(grammar=automaton(edges, final, **fields))
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, guided_decoding=constraint, **options)


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def follows(edges: Edges, final: list[int], token_ids: list[int]) -> bool:
    state = 0
    for token_id in token_ids[:-1]:
        state = edges[state][token_id]
    return token_ids[-1] == EOS and state in final


def test_an_output_follows_its_grammar_and_ends_with_it(llm: LLM) -> None:
    for params in (
        guided(CHOICE, [2]),
        guided(CHOICE, [2], temperature=1, seed=3),
        SamplingParams(max_tokens=9, structured_outputs=StructuredOutputsParams(grammar=automaton(CHOICE, [2]))),
    ):
        [output] = llm.generate([PROMPT], params, **QUIET)
        assert follows(CHOICE, [2], tokens(output)) and output.outputs[0].finish_reason == "stop"


def count_steps(llm: LLM) -> list[int]:
    runner = llm.llm_engine.model_executor.driver_worker.runner
    counts: list[int] = []
    original = type(runner).submit

    def submit(plan: Any) -> Any:
        if plan.rows:
            counts.append(sum(plan.num_tokens))
        return original(runner, plan)

    runner.submit = submit
    return counts


def test_forced_tokens_join_the_next_chunk(llm: LLM) -> None:
    counts = count_steps(llm)
    try:
        [forced] = llm.generate([PROMPT], guided(CHAIN, [12]), **QUIET)
        num_steps = len(counts)
        counts.clear()
        [drawn] = llm.generate([PROMPT], guided(CHAIN, [12], logprobs=0), **QUIET)
        assert len(counts) == 13
    finally:
        del llm.llm_engine.model_executor.driver_worker.runner.submit
    assert tokens(forced) == tokens(drawn) and len(tokens(forced)) == 13
    assert num_steps == 2  # the prompt; nine forced tokens, after which there is a choice, and then the end is forced


@pytest.mark.parametrize("max_tokens", [1, 2, 9, 10, 11, 12])
def test_forced_tokens_do_not_pass_the_limit(llm: LLM, max_tokens: int) -> None:
    [output] = llm.generate([PROMPT], guided(CHAIN, [12], max_tokens), **QUIET)
    assert len(tokens(output)) == max_tokens and output.outputs[0].finish_reason == "length"


def test_a_row_that_waits_for_its_grammar_holds_nobody_up(llm: LLM) -> None:
    engine = llm.llm_engine
    slow = guided(CHOICE, [2], seconds=0.7)
    engine.add_request("slow", PROMPT, slow)
    engine.add_request("fast", PROMPT, guided(CHOICE, [2]))
    engine.add_request("free", PROMPT, SamplingParams(max_tokens=5, temperature=0))
    finished: list[str] = []
    started = time.monotonic()
    while engine.has_unfinished_requests():
        finished += [output.request_id for output in engine.step() if output.finished]
        assert time.monotonic() < started + 60
    assert finished[-1] == "slow" and sorted(finished) == ["fast", "free", "slow"]


def test_a_grammar_that_takes_too_long_is_given_up_while_others_run(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.llm_engine
    monkeypatch.setattr(engine.grammars, "_compile_seconds", 0.1)
    engine.add_request("slow", PROMPT, guided(CHOICE, [2], seconds=1.5))
    engine.add_request("free", PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
    ended = []
    while not ended:
        time.sleep(0.01)
        ended = [output for output in engine.step() if output.finished]
    assert ended[0].request_id == "slow" and "could not be compiled in" in ended[0].error
    engine.abort_request("free")


def test_without_a_thread_for_its_grammar_a_request_does_not_enter(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    engine = llm.llm_engine
    params = guided(CHOICE, [2], seconds=0.01, max_tokens=7)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"):
            llm.generate([PROMPT], params, **QUIET)
    assert not engine.has_unfinished_requests()
    [output] = llm.generate([PROMPT], params, **QUIET)
    assert follows(CHOICE, [2], tokens(output))


def test_a_waiting_request_can_be_aborted(llm: LLM) -> None:
    engine = llm.llm_engine
    for request_id, aborted in (("one", "one"), ("two", "two"), ("n", "n")):
        engine.add_request(
            request_id, PROMPT, guided(CHOICE, [2], seconds=0.2, n=1 + (request_id == "n"), temperature=1)
        )
        engine.abort_request(aborted)
        assert not engine.has_unfinished_requests()
    time.sleep(0.3)
    engine.add_request("last", PROMPT, guided(CHOICE, [2]))
    seen = []
    while engine.has_unfinished_requests():
        seen += engine.step()
    assert [output.request_id for output in seen if output.finished] == ["last"]


def test_a_request_is_aborted_by_the_id_of_a_sample_too(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("pair", PROMPT, guided(CHAIN, [12], temperature=1, n=2))
    while not engine.scheduler.num_guided:
        engine.step()
    assert engine.scheduler.num_guided == 2
    engine.abort_request(engine.output_processor.child_ids("pair")[1])
    assert not engine.has_unfinished_requests()
    assert engine.scheduler.num_unfinished == engine.scheduler.num_guided == 0


def test_tokens_that_wait_for_a_grammar_are_counted(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("pair", PROMPT, guided(CHOICE, [2], seconds=0.2, temperature=1, n=2))
    assert engine.grammar_gate.num_tokens == 2 * len(PROMPT["prompt_token_ids"])
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.grammar_gate.num_tokens == 0


def test_what_fails_is_an_error_of_its_row(llm: LLM) -> None:
    params = [
        guided(CHOICE, [2]),
        guided(CHOICE, [2], late="too large"),
        guided(CHOICE, [2], broken="bad at 3"),
        guided(CHOICE, [2], bug="oh"),
        guided(CHOICE, [2], fails_at=1),
        guided(CHOICE, [2]),
    ]
    outputs = llm.generate([PROMPT] * 6, params, on_error="return", **QUIET)
    errors = [output.error for output in outputs]
    assert errors[0] is None and errors[5] is None and tokens(outputs[0]) == tokens(outputs[5])
    for error, text in zip(errors[1:5], ["too large", "bad at 3", "ZeroDivisionError: oh", "too hard"], strict=True):
        assert error is not None and text in error
    assert {output.outputs[0].finish_reason for output in outputs[1:5]} == {"error"}


def test_what_check_finds_is_raised_before_any_work(llm: LLM) -> None:
    with pytest.raises(BatchValidationError) as caught:
        llm.generate([PROMPT] * 3, [guided(CHOICE, [2], broken=f"bad at {i}") for i in range(3)], **QUIET)
    assert sorted(caught.value.errors) == [0, 1, 2] and "bad at 2" in caught.value.errors[2]
    with pytest.raises(TacoError, match="too large"):
        llm.generate([PROMPT] * 2, [guided(CHOICE, [2]), guided(CHOICE, [2], late="too large")], **QUIET)
    assert not llm.llm_engine.has_unfinished_requests()


def test_all_samples_and_all_beams_follow(llm: LLM) -> None:
    edges: Edges = {0: {40: 1, 50: 1, 60: 1}, 1: {40: 2, 50: 2, 60: 0}, 2: {}}
    [output] = llm.generate([PROMPT], guided(edges, [2], n=5, temperature=1, seed=1), **QUIET)
    assert all(follows(edges, [2], list(sample.token_ids)) for sample in output.outputs) and len(output.outputs) == 5
    constraint = StructuredOutputsParams(grammar=automaton(edges, [2]))
    beam_params = BeamSearchParams(beam_width=3, max_tokens=8, structured_outputs=constraint)
    [found] = llm.beam_search([PROMPT], beam_params)
    texts = [beam.tokens[4:] for beam in found.sequences]
    assert len(texts) == 3 and all(follows(edges, [2], text) for text in texts)
    single: Edges = {0: {40: 1}, 1: {50: 2}, 2: {}}
    beam_params.structured_outputs = StructuredOutputsParams(grammar=automaton(single, [2]))
    [found] = llm.beam_search([PROMPT], beam_params)  # fewer outputs than beams
    assert [beam.tokens[4:] for beam in found.sequences] == [[40, 50, EOS]]


def test_a_grammar_lives_as_long_as_a_request_or_the_cache_needs_it(llm: LLM, backend: ToyBackend) -> None:
    llm.llm_engine.grammars.set_tokenizer(llm.get_tokenizer())
    backend.compiled.clear()
    llm.generate([PROMPT] * 20, guided(CHOICE, [2], temperature=1), **QUIET)
    gc.collect()
    llm.generate([PROMPT] * 20, guided(CHOICE, [2], temperature=1), **QUIET)
    assert len(backend.compiled) == 1
