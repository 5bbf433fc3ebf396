"""`LLM` with the real engine and a tiny random Llama, against transformers."""

from __future__ import annotations

import copy
import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from taco import LLM, SamplingParams
from taco.errors import EngineDeadError, TacoError
from taco.sampling_params import RequestOutputKind
from tests.entrypoints.conftest import NUM_POSITIONS
from tests.tiny_tokenizers import byte_level_tokenizer

QUIET: dict[str, Any] = {"use_tqdm": False}
BLOCK = 16
# Around the edges of blocks; the tokens are arbitrary.
PROMPTS = [[5 + (7 * i * n + n) % 250 for i in range(n)] for n in (1, 2, 15, 16, 17, 31, 32, 33, 48, 65)]
Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def make(tiny_llama_path: Path) -> Make:
    def make(**kwargs: Any) -> LLM:
        defaults = {"dtype": "float32", "kv_cache_memory_bytes": 2 << 20, "max_num_seqs": 8, "swap_space": 0.01}
        return LLM(str(tiny_llama_path), **{**defaults, **kwargs})

    return make


@pytest.fixture(scope="module")
def llm(make: Make) -> Iterator[LLM]:
    with make() as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(tiny_llama_path: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama_path, dtype=torch.float32).eval()


def greedy(reference: LlamaForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(reference: LlamaForCausalLM) -> list[list[int]]:
    return [greedy(reference, prompt, 12) for prompt in PROMPTS]


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_seqs": 3, "max_num_batched_tokens": 8},
        {"enable_prefix_caching": False, "disable_async_output_proc": True},
        {"num_gpu_blocks_override": 10, "preemption_mode": "recompute"},
        {"num_gpu_blocks_override": 10, "preemption_mode": "swap"},
    ],
    ids=str,
)
def test_greedy_tokens_equal_transformers_whatever_shares_the_batch(
    make: Make, expected: list[list[int]], limits: dict[str, Any]
) -> None:
    with make(**limits) as llm:
        for _ in range(2):  # the second time prompts are found in the prefix cache
            outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12), **QUIET)
            assert tokens(outputs) == expected
            assert [output.prompt_token_ids for output in outputs] == PROMPTS
    tokenizer = byte_level_tokenizer()
    for output in outputs:
        text = tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
        assert text.startswith(output.outputs[0].text) and len(text) - len(output.outputs[0].text) <= 2


def test_logprobs_equal_transformers(llm: LLM, reference: LlamaForCausalLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params, **QUIET), strict=True):
        completion = output.outputs[0]
        ids = prompt + completion.token_ids
        with torch.inference_mode():
            scores = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        rows = [*output.prompt_logprobs[1:], *(completion.logprobs or ())]
        assert len(rows) == len(ids) - 1
        for position, row in enumerate(rows):
            assert row is not None
            assert list(row)[0] == ids[position + 1]
            for token, entry in row.items():
                assert entry.logprob == pytest.approx(float(scores[position, token]), abs=1e-3)
            best = [token for token, entry in row.items() if entry.rank is not None and entry.rank <= 2]
            assert set(best) == set(scores[position].topk(2).indices.tolist())
        own = [row[token].logprob for row, token in zip(completion.logprobs or (), completion.token_ids, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(own))


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 3, "max_num_batched_tokens": 8, "async_scheduling": True},
        {"num_gpu_blocks_override": 10, "preemption_mode": "recompute"},
        {"num_gpu_blocks_override": 10, "preemption_mode": "swap"},
    ],
    ids=str,
)
def test_given_tokens_of_a_prompt_are_scored_as_by_transformers(
    make: Make,
    reference: LlamaForCausalLM,
    expected: list[list[int]],
    limits: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if limits:
        monkeypatch.setattr("taco.worker.memory.logits_rows", lambda *_: 5)
    prompts = PROMPTS[1:]
    params = []
    for index, prompt in enumerate(prompts):
        start = [None, len(prompt) // 2, 0, len(prompt) - 2, len(prompt) // 2][index % 5]
        ids = np.random.default_rng(index).integers(-1, 256, (len(prompt) - 1 - (start or 0), 1 + index % 3))
        params.append(
            SamplingParams(
                temperature=0.5 if index == 3 else 0,  # the scores know no temperature
                n=2 if index == 3 else 1,
                max_tokens=12,
                prompt_logprob_token_ids=ids,
                prompt_logprob_start=start,
                prompt_logprobs=1 if index % 2 else None,
            )
        )
    with make(**limits) as llm:
        for _ in range(2):  # the second time prompts are found in the prefix cache, up to what is scored
            outputs = llm.generate(prompts, params, **QUIET)
            for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
                ids, start = params[index].prompt_logprob_token_ids, params[index].prompt_logprob_start or 0
                assert isinstance(ids, np.ndarray)
                with torch.inference_mode():
                    scores = reference(torch.tensor([prompt])).logits[0].log_softmax(-1).numpy()
                found = output.prompt_token_id_logprobs
                assert found is not None and found.dtype == np.float32
                wanted = np.where(ids < 0, -np.inf, np.take_along_axis(scores[start:-1], ids.clip(0), 1))
                np.testing.assert_allclose(found, wanted, atol=1e-4)
                assert (output.prompt_logprobs is None) == (params[index].prompt_logprobs is None)
                if index != 3:
                    assert output.outputs[0].token_ids == expected[index + 1]
                for position, row in enumerate(output.prompt_logprobs or ()):
                    if row is not None and index != 3:
                        own = prompt[position]
                        assert row[own].logprob == pytest.approx(float(scores[position - 1, own]), abs=1e-4)
        cached = [output.num_cached_tokens for output in outputs]
    # As far as what is scored, unless the device is short of blocks.
    assert cached[0] == 0 and ("num_gpu_blocks_override" in limits or cached[4] == len(prompts[4]) // 2)


@pytest.mark.parametrize("limits", [{}, {"max_num_seqs": 3, "async_scheduling": True}], ids=str)
def test_traces_are_followed_and_scored_as_prompts_are(make: Make, limits: dict[str, Any]) -> None:
    traces = [[(11 * i + n) % 200 for n in range(1 + i)] for i in range(len(PROMPTS))]
    traces[4][2] = 1  # an end of sequence ends nothing
    params = [
        SamplingParams(temperature=i % 2, max_tokens=8, logprobs=0, trace_decode_token_ids=trace)
        for i, trace in enumerate(traces)
    ]
    with make(**limits) as llm:
        outputs = llm.generate(PROMPTS, params, **QUIET)
        assert tokens(outputs) == [trace[:8] for trace in traces]
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
        whole = [prompt + trace[:8] for prompt, trace in zip(PROMPTS, traces, strict=True)]
        scored = llm.generate(
            whole,
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=1,
                    prompt_logprob_token_ids=[[token] for token in trace[:8]],
                    prompt_logprob_start=len(prompt) - 1,
                )
                for prompt, trace in zip(PROMPTS, traces, strict=True)
            ],
            **QUIET,
        )
    for trace, output, score in zip(traces, outputs, scored, strict=True):
        rows = output.outputs[0].logprobs
        assert rows is not None and score.prompt_token_id_logprobs is not None
        followed = [row[token].logprob for row, token in zip(rows, trace[:8], strict=True)]
        np.testing.assert_allclose(followed, score.prompt_token_id_logprobs[:, 0], atol=1e-4)


def test_samples_do_not_depend_on_the_batch(make: Make) -> None:
    params = [SamplingParams(temperature=1.0, top_k=50, seed=i, max_tokens=8, n=1 + i % 2) for i in range(len(PROMPTS))]
    with make() as together, make(max_num_seqs=1, max_num_batched_tokens=16) as alone:
        batch = together.generate(PROMPTS, params, **QUIET)
        single = [alone.generate(prompt, one, **QUIET)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    assert [o.outputs for o in batch] == [o.outputs for o in single]
    assert any(len({tuple(c.token_ids) for c in o.outputs}) == 2 for o in batch)


def test_rows_without_a_seed_differ_and_a_new_llm_repeats_them(make: Make) -> None:
    runs = []
    for _ in range(2):
        with make() as llm:
            runs.append(tokens(llm.generate([PROMPTS[3]] * 6, SamplingParams(max_tokens=6), **QUIET)))
    assert runs[0] == runs[1] and len(set(map(tuple, runs[0]))) > 1


def test_the_log_names_the_model_as_it_is_served(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="taco"), make(served_model_name=["short", "other"]):
        assert any(message.startswith("Loaded short (float32, ") for message in caplog.messages)


def test_the_tokenizer_has_the_limits_of_its_vocabulary(make: Make) -> None:
    with make() as llm:
        tokenizer = llm.get_tokenizer()
        assert tokenizer.max_token_id == max(tokenizer.get_vocab().values())
        assert tokenizer.max_chars_per_token == max(map(len, tokenizer.get_vocab()))
        other = copy.deepcopy(tokenizer)
        del other.max_token_id
        other.add_tokens(["<longer than every other token>"])
        llm.set_tokenizer(other)
        assert llm.llm_engine.tokenizer.max_token_id == len(other) - 1


def test_rows_without_a_seed_go_on_differing_when_the_tokenizer_is_set(make: Make) -> None:
    runs = []
    for sets_tokenizer in (False, True):
        with make() as llm:
            first = tokens(llm.generate([PROMPTS[3]] * 3, SamplingParams(max_tokens=6), **QUIET))
            if sets_tokenizer:
                llm.set_tokenizer(llm.get_tokenizer())
            second = tokens(llm.generate([PROMPTS[3]] * 3, SamplingParams(max_tokens=6), **QUIET))
            runs.append((first, second))
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_best_of_returns_the_likeliest_samples(llm: LLM) -> None:
    [every] = llm.generate("hello", SamplingParams(n=5, seed=3, max_tokens=4, logprobs=0), **QUIET)
    [best] = llm.generate("hello", SamplingParams(n=2, best_of=5, seed=3, max_tokens=4), **QUIET)
    ranked = sorted(every.outputs, key=lambda c: -(c.cumulative_logprob or 0.0))
    assert [c.token_ids for c in best.outputs] == [c.token_ids for c in ranked[:2]]
    assert [c.index for c in best.outputs] == [0, 1] and best.outputs[0].logprobs is None


def test_a_stop_string_ends_the_row_and_the_next_call_is_clean(llm: LLM, expected: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    texts = [output.outputs[0].text for output in llm.generate(PROMPTS, params, **QUIET)]
    row = max(range(len(texts)), key=lambda i: len(texts[i]))
    stop = texts[row][2:4]
    [output] = llm.generate(PROMPTS[row], SamplingParams(temperature=0, max_tokens=12, stop=[stop]), **QUIET)
    assert output.outputs[0].text == texts[row][: texts[row].index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert tokens(llm.generate(PROMPTS, params, **QUIET)) == expected


def test_streaming_adds_up_to_the_final_text(llm: LLM) -> None:
    [final] = llm.generate("the cat", SamplingParams(temperature=0, max_tokens=10), **QUIET)
    for kind in (RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA):
        engine = llm.llm_engine
        engine.add_request("stream", "the cat", SamplingParams(temperature=0, max_tokens=10, output_kind=kind))
        texts = []
        while engine.has_unfinished_requests():
            texts += [output.outputs[0].text for output in engine.step()]
        assert len(texts) == len(final.outputs[0].token_ids)
        text = texts[-1] if kind is RequestOutputKind.CUMULATIVE else "".join(texts)
        assert text == final.outputs[0].text


@pytest.mark.parametrize(("version", "num_tokens"), [("0.6", [1, 2, 0]), ("0.33", [None, 1, None])])
def test_prompts_near_the_limit_of_the_context(make: Make, version: str, num_tokens: list[int | None]) -> None:
    sizes = [NUM_POSITIONS, NUM_POSITIONS - 1, NUM_POSITIONS + 1]
    prompts = [[5 + i % 250 for i in range(size)] for size in sizes]
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    with make(compat_version=version) as llm:
        outputs = llm.generate(prompts, params, on_error="return", **QUIET)
    for output, number in zip(outputs, num_tokens, strict=True):
        [completion] = output.outputs
        assert len(completion.token_ids) == (number or 0)
        assert completion.finish_reason == ("error" if number is None else "length")


def test_a_bad_row_does_not_touch_the_others(llm: LLM, expected: list[list[int]]) -> None:
    prompts: list[Any] = list(PROMPTS)
    prompts[4], prompts[7] = [], [10**6]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), on_error="return", **QUIET)
    for index, output in enumerate(outputs):
        if index in (4, 7):
            assert output.error is not None
        else:
            assert output.outputs[0].token_ids == expected[index]


def test_a_processor_that_fails_costs_its_row_alone(llm: LLM, expected: list[list[int]]) -> None:
    def fail(output_token_ids: Any, logits: Any) -> Any:
        if len(output_token_ids) == 2:
            raise RuntimeError("boom")
        return logits

    plain = SamplingParams(temperature=0, max_tokens=12)
    params = [plain] * len(PROMPTS)
    params[2] = SamplingParams(temperature=0, max_tokens=12, logits_processors=[fail])
    outputs = llm.generate(PROMPTS, params, on_error="return", **QUIET)
    assert outputs[2].outputs[0].finish_reason == "error" and "boom" in (outputs[2].error or "")
    assert [t for i, t in enumerate(tokens(outputs)) if i != 2] == [t for i, t in enumerate(expected) if i != 2]
    with pytest.raises(TacoError, match="Row 2 failed while it ran.*boom"):
        llm.generate(PROMPTS, params, **QUIET)
    assert tokens(llm.generate(PROMPTS, plain, **QUIET)) == expected


def test_an_interrupt_leaves_a_clean_engine(llm: LLM, expected: list[list[int]]) -> None:
    def interrupt(output_token_ids: Any, logits: Any) -> Any:
        raise KeyboardInterrupt

    plain = SamplingParams(temperature=0, max_tokens=12)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[:2], [plain, SamplingParams(logits_processors=[interrupt])], **QUIET)
    assert tokens(llm.generate(PROMPTS, plain, **QUIET)) == expected


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    params = SamplingParams(temperature=0, max_tokens=5)
    [output] = llm.chat(messages, params, **QUIET)
    ids = byte_level_tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert output.prompt_token_ids == ids
    assert output.outputs[0].token_ids == llm.generate(ids, params, **QUIET)[0].outputs[0].token_ids


def test_without_a_tokenizer(make: Make, expected: list[list[int]]) -> None:
    with make(skip_tokenizer_init=True) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[1]), **QUIET)
        assert tokens(outputs) == expected and outputs[0].outputs[0].text == ""
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            llm.generate("text", **QUIET)
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            llm.get_tokenizer()


def test_an_iterator_gives_the_same(llm: LLM, expected: list[list[int]]) -> None:
    outputs = llm.generate(iter(PROMPTS), SamplingParams(temperature=0, max_tokens=12), **QUIET)
    assert tokens(outputs) == expected


def test_all_memory_is_given_back_at_once(make: Make) -> None:
    def tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    gc.collect()
    before = tensors()
    llm = make()
    llm.generate(PROMPTS, SamplingParams(max_tokens=3, prompt_logprobs=1), **QUIET)
    engine = weakref.ref(llm.llm_engine)
    assert tensors() > before
    gc.disable()
    try:
        del llm
        assert engine() is None
        assert tensors() <= before
    finally:
        gc.enable()
    llm = make()
    llm.close()
    assert tensors() <= before
    with pytest.raises(EngineDeadError):
        llm.generate("hello", **QUIET)


def test_deleting_the_model_executor_closes_the_engine(make: Make) -> None:
    llm = make()
    assert llm.llm_engine.model_executor is not None
    del llm.llm_engine.model_executor  # as programs do to free memory
    assert llm.llm_engine.model_executor is None
    with pytest.raises(EngineDeadError):
        llm.generate("hello", **QUIET)


def test_nothing_is_closed_while_python_ends(make: Make) -> None:
    with make() as llm:
        for owner in (llm, llm.llm_engine):
            owner.__del__(lambda: True)
        assert llm.generate(PROMPTS[0], **QUIET)


def test_scattered_prompts_with_common_prefixes_run_together(make: Make) -> None:
    """The cache holds one of the four prefixes at a time, and each is computed once all the same."""
    prefixes = [[10 + 7 * number] * 64 for number in range(4)]
    prompts = [[*prefixes[i % 4], 100 + i, 5] for i in range(24)]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    with make(kv_cache_memory_bytes=None, num_gpu_blocks_override=8, max_model_len=80, max_num_seqs=1) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, **QUIET)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [output.num_cached_tokens for output in outputs] == [0] * 4 + [64] * 20


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_does_not_lose_what_was_finished(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(temperature=0, max_tokens=2 + 3 * (i % 2), ignore_eos=True) for i in range(len(PROMPTS))]
    with make() as llm:
        expected = tokens(llm.generate(PROMPTS, params, **QUIET))
        step = llm.llm_engine.step

        def interrupted() -> Any:
            outputs = step()
            if outputs:
                signal.raise_signal(signal.SIGINT)
            return outputs

        monkeypatch.setattr(llm.llm_engine, "step", interrupted)
        for call in (
            lambda: llm.generate(PROMPTS, params, **QUIET),
            lambda: (llm.enqueue(PROMPTS, params), llm.wait_for_completion(**QUIET)),
        ):
            with pytest.raises(KeyboardInterrupt) as caught:
                call()
            finished = caught.value.finished_outputs  # type: ignore[attr-defined]
            assert 0 < len(finished) < len(PROMPTS)
            assert all(tokens([output]) == [expected[index]] for index, output in finished.items())


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_a_second_ctrl_c_leaves_nothing_behind_either(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with make() as llm:
        expected = tokens(llm.generate(PROMPTS, params, **QUIET))
        engine = llm.llm_engine

        def interrupted(function: Any) -> Any:
            def call(*args: Any) -> Any:
                signal.raise_signal(signal.SIGINT)
                return function(*args)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", interrupted(engine.step))
            patch.setattr(engine, "abort_request", interrupted(engine.abort_request))
            with pytest.raises(KeyboardInterrupt) as caught:
                llm.generate(PROMPTS, params, **QUIET)
        assert caught.value.finished_outputs == {}  # type: ignore[attr-defined]
        assert tokens(llm.generate(PROMPTS, params, **QUIET)) == expected


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_leaves_nothing_behind(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with make() as llm:
        expected = tokens(llm.generate(PROMPTS, params, **QUIET))
        admit = llm.llm_engine.scheduler._admit

        def interrupted(*args: Any) -> int:
            monkeypatch.undo()
            count = admit(*args)
            signal.raise_signal(signal.SIGINT)
            return count

        monkeypatch.setattr(llm.llm_engine.scheduler, "_admit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, params, **QUIET)
        assert not llm.llm_engine.has_unfinished_requests()
        llm.llm_engine.scheduler.blocks.check_integrity([])
        assert tokens(llm.generate(PROMPTS, params, **QUIET)) == expected


def test_an_engine_that_cannot_be_repaired_is_closed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(llm.llm_engine.scheduler, "schedule", fail)
    monkeypatch.setattr(llm.llm_engine.scheduler, "reset", fail)
    with pytest.raises(RuntimeError, match="broken"):
        llm.generate(PROMPTS[:1], **QUIET)
    with pytest.raises(EngineDeadError):
        llm.generate(PROMPTS[:1], **QUIET)


def test_a_logits_processor_may_return_another_view_of_its_argument(make: Make) -> None:
    def first(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits[:1].expand(len(logits))

    with make() as llm:
        [output] = llm.generate(
            [PROMPTS[4]],
            SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logits_processors=[first]),
            **QUIET,
        )
    assert list(output.outputs[0].token_ids) == [0, 0]  # all equal, so the lowest
