"""`LLM(logits_processors=...)`: the batch-level processors of vLLM 0.33, against the ones of single requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taco import LLM, SamplingParams
from taco.errors import BatchValidationError, EngineError, TacoValidationError
from taco.logits_processor import AdapterLogitsProcessor, BatchUpdate, LogitsProcessor, process_dict_updates
from taco.worker import memory

QUIET: dict[str, Any] = {"use_tqdm": False}
PROMPTS = [[5 + (7 * i * n + n) % 250 for i in range(n)] for n in (1, 2, 15, 16, 17, 31, 32, 33, 48, 65)]
Make = Callable[..., LLM]


class Stepping(LogitsProcessor):
    """The k-th output token of a request with `extra_args["step"]` is `step * k`; its state counts by the output."""

    made: list[Stepping] = []

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.vllm_config, self.device, self.is_pin_memory = vllm_config, device, is_pin_memory
        self.rows: dict[int, tuple[int, list[int]]] = {}
        self.batch_sizes: set[int] = set()
        self.made.append(self)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        step = (sampling_params.extra_args or {}).get("step", 1)
        if not isinstance(step, int):
            raise ValueError(f"step must be an int, got {step!r}")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def state(params: SamplingParams, prompt: list[int] | None, output: list[int]) -> tuple[int, list[int]] | None:
            step = (params.extra_args or {}).get("step")
            return None if step is None else (step, output)

        process_dict_updates(self.rows, batch_update, state)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        self.batch_sizes.add(len(logits))
        for row, (step, output) in self.rows.items():
            logits[row] = -torch.inf
            logits[row, step * len(output)] = 0.0
        return logits


class Failing(Stepping):
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if any(step == 13 for step, _ in self.rows.values()):
            raise RuntimeError("unlucky")
        return super().apply(logits)


def shifted(prompt: Any, output: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits.roll(1 + len(prompt) + len(output))


class Adapted(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        return shifted if params.extra_args else None


@pytest.fixture(scope="module")
def make(tiny_llama_path: Path) -> Make:
    def make(**kwargs: Any) -> LLM:
        defaults = {"dtype": "float32", "kv_cache_memory_bytes": 2 << 20, "max_num_seqs": 8}
        return LLM(str(tiny_llama_path), **{**defaults, **kwargs})

    return make


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def params_of(index: int, **fields: Any) -> SamplingParams:
    num_samples = 2 if index == 4 else 1
    return SamplingParams(temperature=0.7, seed=index, max_tokens=3 + index, ignore_eos=True, n=num_samples, **fields)


@pytest.fixture(scope="module")
def free(make: Make) -> list[list[int]]:
    """What is drawn without processors."""
    with make() as llm:
        return tokens(llm.generate(PROMPTS, [params_of(index) for index in range(len(PROMPTS))], **QUIET))


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"async_scheduling": True},
        {"max_num_seqs": 4, "max_num_batched_tokens": 8},  # rows that wait leave the batch
        {"num_gpu_blocks_override": 10, "preemption_mode": "recompute"},
    ],
    ids=str,
)
def test_each_row_is_edited_as_its_parameters_say(
    make: Make, free: list[list[int]], limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without processors, calls have two rows.
    monkeypatch.setattr("taco.worker.sampler.sampler.BLOCK_ENTRIES_CPU", 600)
    monkeypatch.setitem(memory.LOGITS_BYTES, "cpu", 2400)
    steps = [None if index % 3 else 1 + index for index in range(len(PROMPTS))]
    Stepping.made.clear()
    params = [params_of(index, extra_args=step and {"step": step}) for index, step in enumerate(steps)]
    with make(logits_processors=[Stepping], **limits) as llm:
        found = tokens(llm.generate(PROMPTS, params, **QUIET))
        config = llm.llm_engine.config
    steps_of_samples = [step for step, one in zip(steps, params, strict=True) for _ in range(one.n)]
    for step, own, row in zip(steps_of_samples, free, found, strict=True):
        assert row == (own if step is None else [step * place for place in range(len(own))])
    (processor,) = Stepping.made
    assert processor.vllm_config.model_config is config.model_config
    assert processor.device == torch.device("cpu") and processor.is_pin_memory is False
    assert max(processor.batch_sizes) > 2


def test_an_adapter_is_the_processor_of_single_requests(make: Make) -> None:
    with make() as llm:
        alone = SamplingParams(temperature=0, max_tokens=9, logits_processors=[shifted])
        expected = tokens(llm.generate(PROMPTS, alone, **QUIET))
        plain = tokens(llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=9), **QUIET))
    with make(logits_processors=[f"{__name__}:Adapted"]) as llm:
        params = SamplingParams(temperature=0, max_tokens=9, extra_args={"shift": True})
        assert tokens(llm.generate(PROMPTS, params, **QUIET)) == expected != plain
        assert tokens(llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=9), **QUIET)) == plain


def test_a_processor_with_a_memory_is_cloned_for_each_sequence(make: Make) -> None:
    class Counting:
        """The k-th call for one sequence forbids all but token 20 + k; calls are counted, not tokens."""

        def __init__(self) -> None:
            self.num_calls = 0

        def clone(self) -> Counting:
            return Counting()

        def __call__(self, output_token_ids: tuple[int, ...], logits: torch.Tensor) -> torch.Tensor:
            self.num_calls += 1
            edited = torch.full_like(logits, -torch.inf)
            edited[20 + self.num_calls] = 0.0
            return edited

    given = Counting()
    params = [SamplingParams(n=1 + index % 3, max_tokens=9, logits_processors=[given]) for index in range(2)]
    with make(num_gpu_blocks_override=10, preemption_mode="recompute") as llm:
        found = tokens(llm.generate(PROMPTS, [params[index % 2] for index in range(len(PROMPTS))], **QUIET))
    assert found == [list(range(21, 30))] * 15
    assert given.num_calls == 0 and params[0].logits_processors == [given]


def test_parameters_that_a_processor_refuses_are_errors_of_their_rows(make: Make) -> None:
    params = [SamplingParams(max_tokens=2, extra_args={"step": step}) for step in (2, "two", 3)]
    with make(logits_processors=[Stepping]) as llm:
        with pytest.raises(BatchValidationError, match="row 1: Stepping: step must be an int, got 'two'"):
            llm.generate(PROMPTS[:3], params, **QUIET)
        outputs = llm.generate(PROMPTS[:3], params, on_error="return", **QUIET)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]


def test_a_processor_that_fails_ends_the_call_and_leaves_the_engine_clean(make: Make) -> None:
    params = [SamplingParams(max_tokens=3, extra_args={"step": step}) for step in (2, 13, 3)]
    with make(logits_processors=[Failing]) as llm:
        for _ in range(2):
            with pytest.raises(EngineError, match="The logits processor Failing failed: RuntimeError: unlucky"):
                llm.generate(PROMPTS[:3], params, **QUIET)
            assert tokens(llm.generate(PROMPTS[:2], params[::2], **QUIET)) == [[0, 2, 4], [0, 3, 6]]


def test_what_cannot_be_is_said_before_the_model_is_loaded(make: Make) -> None:
    with pytest.raises(TacoValidationError, match="logits_processors=.*not a class that derives from LogitsProcessor"):
        make(logits_processors=[shifted])
    with pytest.raises(TacoValidationError, match="logits_processors=.*must be a list"):
        make(logits_processors=Stepping)
    with pytest.raises(TacoValidationError, match="logits_processors: a pooling model has no logits"):
        make(logits_processors=[Stepping], task="embed")


@pytest.mark.gpu
def test_processors_get_the_device_and_the_rows_of_a_gpu(make: Make) -> None:
    Stepping.made.clear()
    params = [SamplingParams(max_tokens=6, ignore_eos=True, extra_args={"step": step}) for step in range(2, 12)]
    with make(logits_processors=[Stepping], device="cuda") as llm:
        assert tokens(llm.generate(PROMPTS, params, **QUIET)) == [
            list(range(0, 6 * step, step)) for step in range(2, 12)
        ]
    (processor,) = Stepping.made
    assert processor.device.type == "cuda" and processor.is_pin_memory
