"""On a CUDA device: what the CPU computes, without waiting for it, in the memory that was counted on.

Everything here runs on the simulated device of `tests/simulated_cuda.py`, and by `make test-gpu` on a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taco import LLM, PoolingParams, SamplingParams
from taco.errors import EngineDeadError
from taco.logits_processor import AdapterLogitsProcessor
from taco.plan import NewRow
from taco.pooling_params import PoolerConfig
from taco.reasoning import ReasoningMarkers
from taco.sampling_params import StructuredOutputsParams
from taco.worker import profile
from taco.worker.kv_cache import KVCache
from taco.worker.model_runner import ModelRunner
from taco.worker.pooling_runner import PoolingRunner
from taco.worker.sampler.feature import Selection
from taco.worker.sampler.thinking import ThinkingBudget
from taco.worker.worker import Worker
from tests.models.harness import tiny_config
from tests.simulated_cuda import simulated_and_real_cuda  # noqa: F401
from tests.tiny_pooling_models import TEXTS, save_model

pytestmark = pytest.mark.usefixtures("simulated_and_real_cuda")

NUM_TOKENS = 12
PROMPTS = [[5 + (7 * i * n + n) % 250 for i in range(n)] for n in (1, 2, 15, 16, 17, 31, 32, 33, 48, 65)]
# A pool in which not all rows have room.
TINY_POOL: dict[str, Any] = {"num_gpu_blocks_override": 10, "max_model_len": 128}
SWAPPING: dict[str, Any] = {**TINY_POOL, "swap_space": 0.01}


def make(path: Path, device: str, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "max_num_seqs": 8, "kv_cache_memory_bytes": 4 << 20, "swap_space": 0}
    if options.keys() & {"num_gpu_blocks_override", "gpu_memory_utilization"}:
        del defaults["kv_cache_memory_bytes"]
    return LLM(str(path), device=device, **defaults | options)


def generate(llm: LLM, params: Any, prompts: list[list[int]] = PROMPTS) -> list[Any]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


@pytest.fixture(scope="module")
def on_the_cpu(tiny_llama_path: Path) -> Callable[..., list[list[int]]]:
    """What the tiny model generates on the CPU for the prompts; found once."""
    found: dict[str, list[list[int]]] = {}

    def on_the_cpu(params: Any, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[list[int]]:
        key = f"{params} {prompts} {options}"
        if key not in found:
            with make(tiny_llama_path, "cpu", **options) as llm:
                found[key] = tokens(generate(llm, params, prompts))
        return found[key]

    return on_the_cpu


# What is generated


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_memory_bytes": 4 << 20},
        {"kv_cache_memory_bytes": 4 << 20, "disable_async_output_proc": True},
        SWAPPING,
        TINY_POOL,
        {"gpu_memory_utilization": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True),
        SamplingParams(
            temperature=0, repetition_penalty=1.3, no_repeat_ngram_size=2, max_tokens=NUM_TOKENS, ignore_eos=True
        ),
    ],
    ids=["greedy", "random", "edited"],
)
def test_tokens_equal_those_of_the_cpu(
    tiny_llama_path: Path,
    on_the_cpu: Callable[..., list[list[int]]],
    params: SamplingParams,
    options: dict[str, Any],
) -> None:
    with make(tiny_llama_path, "cuda", **options) as llm:
        assert tokens(generate(llm, params)) == on_the_cpu(params)


def rolled(output: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits.roll(1 + len(output))


class Rolled(AdapterLogitsProcessor):
    """`rolled` for requests with extra arguments."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        return rolled if params.extra_args else None


def varied(**fields: Any) -> list[SamplingParams]:
    """Parameters of the prompts that have the fields, each greedy or random, some filtered."""
    filters: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.8}, {}, {"min_p": 0.02}]
    each = [
        {"temperature": 0.8, "seed": index, **filters[index % 4]} if index % 3 else {"temperature": 0}
        for index in range(len(PROMPTS))
    ]
    return [SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **fields, **own}) for own in each]


@pytest.mark.parametrize(
    ("params", "options"),
    [
        (SamplingParams(n=3, temperature=0.9, seed=3, max_tokens=8, ignore_eos=True), {}),
        (
            SamplingParams(n=3, temperature=0.9, seed=3, max_tokens=8, ignore_eos=True),
            SWAPPING,
        ),
        (SamplingParams(use_beam_search=True, n=3, best_of=4, temperature=0, max_tokens=8), {}),
        (varied(structured_outputs=StructuredOutputsParams(regex="[a-c]{2,9}d|the (cat|hat)+")), {}),
        (varied(structured_outputs=StructuredOutputsParams(json={"type": "object"})), {}),
        (varied(logits_processors=[rolled]), {}),
        (varied(extra_args={"roll": 1}), {"logits_processors": [Rolled]}),
        (varied(bad_words=["a", "th"], logit_bias={40: 3.0, 41: -90}, min_tokens=6, presence_penalty=0.5), {}),
        (varied(allowed_token_ids=list(range(3, 200, 2)), frequency_penalty=0.3), {}),
        (varied(), {"watermark_config": {"key": 42}}),
        (varied(prompt_logprobs=2, logprobs=3), {"max_num_batched_tokens": 16}),
    ],
    ids=[
        *("samples", "swapped samples", "beams", "regex", "json", "processors", "processors of the engine"),
        *("edits", "allowed", "marked", "chunks"),
    ],
)
def test_features_do_what_they_do_on_the_cpu(
    tiny_llama_path: Path, on_the_cpu: Callable[..., list[list[int]]], params: Any, options: dict[str, Any]
) -> None:
    expected = on_the_cpu(params, **options)
    with make(tiny_llama_path, "cuda", **options) as llm:
        assert tokens(generate(llm, params)) == expected


def test_cached_prefixes_are_shared_and_copied(
    tiny_llama_path: Path, on_the_cpu: Callable[..., list[list[int]]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with make(tiny_llama_path, "cuda") as llm:
        for _ in range(2):
            outputs = generate(llm, params)
            assert tokens(outputs) == on_the_cpu(params)
        assert outputs[-1].num_cached_tokens == 64
        # The last block that these share is filled in part, and copied.
        longer = [[*prompt, 7, 8] for prompt in PROMPTS]
        assert tokens(generate(llm, params, longer)) == on_the_cpu(params, prompts=longer)


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({"temperature": 0}, "processed_logprobs"),
        ({"temperature": 0.9, "seed": 3}, "raw_logits"),
        ({"temperature": 0.7, "seed": 3, "top_p": 0.8, "min_p": 0.01}, "processed_logprobs"),
        ({"seed": 3, "structured_outputs": StructuredOutputsParams(regex="([a-c]|the ){20}")}, "processed_logprobs"),
        ({"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="([a-c]|the ){20}")}, "raw_logprobs"),
    ],
    ids=["greedy", "random", "filtered", "guided", "guided, raw"],
)
def test_log_probabilities_are_those_of_the_cpu(tiny_llama_path: Path, fields: dict[str, Any], mode: str) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3, prompt_logprobs=2, **fields)
    found = {}
    for device in ("cpu", "cuda"):
        with make(tiny_llama_path, device, logprobs_mode=mode) as llm:
            found[device] = generate(llm, params)
    for ours, expected in zip(found["cuda"], found["cpu"], strict=True):
        for mine, right in (
            (ours.prompt_logprobs[1:], expected.prompt_logprobs[1:]),
            (ours.outputs[0].logprobs, expected.outputs[0].logprobs),
        ):
            for entries, others in zip(mine, right, strict=True):
                assert {token: entry.rank for token, entry in entries.items()} == {
                    token: entry.rank for token, entry in others.items()
                }
                for token, entry in entries.items():
                    assert entry.logprob == pytest.approx(others[token].logprob, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_come_close_to_float32(tiny_llama_path: Path, dtype: str) -> None:
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    found = {}
    for name in ("float32", dtype):
        with make(tiny_llama_path, "cuda", dtype=name) as llm:
            found[name] = [
                [next(iter(entries.values())).logprob for entries in output.prompt_logprobs[1:]]
                for output in generate(llm, params)
            ]
    for ours, exact in zip(found[dtype], found["float32"], strict=True):
        assert ours == pytest.approx(exact, abs=0.4 if dtype == "bfloat16" else 0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_narrow_types_pool_close_to_float32(tmp_path: Path, model_type: str, dtype: str) -> None:
    save_model(tmp_path, model_type)
    found = []
    for device, name in (("cpu", "float32"), ("cuda", dtype)):
        with make(tmp_path, device, dtype=name, gpu_memory_utilization=0.5) as llm:
            found.append([torch.tensor(output.outputs.embedding) for output in llm.embed(TEXTS, use_tqdm=False)])
    for exact, ours in zip(*found, strict=True):
        assert torch.cosine_similarity(exact, ours, dim=0) > (0.99 if dtype == "bfloat16" else 0.9999)


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3", "opt"])
def test_models_generate_what_they_do_on_the_cpu(tmp_path: Path, model_type: str) -> None:
    save_model(tmp_path, model_type, "AutoModelForCausalLM")
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    found = []
    for device in ("cpu", "cuda"):
        with make(tmp_path, device, max_num_batched_tokens=40) as llm:
            found.append(tokens(generate(llm, params)))
    assert found[0] == found[1]


def test_the_asynchronous_engine_runs_on_the_device(
    tiny_llama_path: Path, on_the_cpu: Callable[..., list[list[int]]]
) -> None:
    import asyncio

    from taco import AsyncEngineArgs, AsyncLLMEngine

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    args = AsyncEngineArgs(
        *(str(tiny_llama_path),), device="cuda", dtype="float32", max_num_seqs=8, kv_cache_memory_bytes=4 << 20
    )
    engine = AsyncLLMEngine.from_engine_args(args)

    async def one(number: int) -> list[int]:
        outputs = engine.generate({"prompt_token_ids": PROMPTS[number]}, params, str(number))
        return [list(output.outputs[0].token_ids) async for output in outputs][-1]

    async def main() -> list[list[int]]:
        return list(await asyncio.gather(*map(one, range(len(PROMPTS)))))

    assert asyncio.run(main()) == on_the_cpu(params)
    engine.shutdown()


# What is pooled


@pytest.mark.parametrize(
    ("model_type", "auto_class", "options", "tasks"),
    [
        ("bert", "AutoModel", {"pooler_config": {"pooling_type": "MEAN"}}, ["embed", "token_embed"]),
        ("modernbert", "AutoModelForSequenceClassification", {}, ["classify"]),
        ("qwen3", "AutoModel", {"max_num_batched_tokens": 16}, ["embed", "token_embed"]),
        ("llama", "AutoModel", {"pooler_config": {"pooling_type": "MEAN"}, "max_num_batched_tokens": 16}, ["embed"]),
        ("gemma3_text", "AutoModel", {"pooler_config": {"pooling_type": "CLS"}}, ["embed"]),
    ],
)
def test_pooled_results_are_those_of_the_cpu(
    tmp_path: Path, model_type: str, auto_class: str, options: dict[str, Any], tasks: list[str]
) -> None:
    save_model(tmp_path, model_type, auto_class)
    if model_type in ("bert", "modernbert"):
        options = {**options, "gpu_memory_utilization": 0.5}
    found = []
    for device in ("cpu", "cuda"):
        with make(tmp_path, device, **options) as llm:
            found.append([llm.encode(TEXTS, PoolingParams(task=task), use_tqdm=False) for task in tasks])
    for expected, ours in zip(*found, strict=True):
        for right, mine in zip(expected, ours, strict=True):
            torch.testing.assert_close(mine.outputs.data, right.outputs.data, atol=1e-5, rtol=1e-4)


# Waiting


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"temperature": 0}, {}),
        ({"temperature": 0.9}, {}),
        ({"top_p": 0.9, "logprobs": 3}, {}),
        ({"top_k": 20, "top_p": 0.8, "min_p": 0.01}, {}),
        ({"min_p": 0.1, "prompt_logprobs": 2}, {}),
        ({"temperature": 0}, SWAPPING),
        ({"temperature": 0.7, "n": 3, "logprobs": 0}, SWAPPING),
    ],
    ids=str,
)
def test_starting_a_step_does_not_wait_for_the_device(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    num_steps = forbid_waiting(monkeypatch, ModelRunner)
    params = SamplingParams(**fields, seed=3, max_tokens=9, ignore_eos=True)
    with make(tiny_llama_path, "cuda", **options) as llm:
        assert all(len(found) == 9 for found in tokens(generate(llm, params)))
    assert num_steps[0] > 9


@pytest.mark.parametrize(
    ("model_type", "auto_class", "options", "params"),
    [
        ("bert", "AutoModel", {}, PoolingParams(task="embed")),
        ("qwen3", "AutoModel", {}, PoolingParams(task="embed")),
        ("bert", "AutoModelForSequenceClassification", {}, PoolingParams(task="classify")),
        (
            *("llama", "AutoModelForCausalLM", {"task": "reward", "override_pooler_config": PoolerConfig("STEP")}),
            PoolingParams(step_tag_id=100, returned_token_ids=[10, 20]),
        ),
    ],
    ids=["encoder", "decoder", "classifier", "steps"],
)
def test_starting_to_pool_does_not_wait_for_the_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    auto_class: str,
    options: dict[str, Any],
    params: PoolingParams,
) -> None:
    save_model(tmp_path, model_type, auto_class)
    num_steps = forbid_waiting(monkeypatch, PoolingRunner)
    prompts: list[Any] = [{"prompt_token_ids": [*prompt, 100]} for prompt in PROMPTS]
    if model_type == "bert":
        prompts = [{**prompt, "token_type_ids": [1] * len(prompt["prompt_token_ids"])} for prompt in prompts]
    with make(tmp_path, "cuda", max_num_seqs=2, **options) as llm:
        outputs = llm.encode(prompts, params, use_tqdm=False)
    assert all(torch.isfinite(output.outputs.data).all() for output in outputs)
    assert num_steps[0] > 4


def forbid_waiting(monkeypatch: pytest.MonkeyPatch, runner_class: type[ModelRunner]) -> list[int]:
    """From the fourth step on, `submit` may not wait for the device; what is returned counts the steps."""
    submit = runner_class.submit
    num_steps = [0]

    def checked(*args: Any) -> Any:
        num_steps[0] += 1
        # The first steps load kernels and make handles of libraries.
        torch.cuda.set_sync_debug_mode("error" if num_steps[0] > 3 else "default")
        try:
            return submit(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(runner_class, "submit", checked)
    return num_steps


def test_writing_single_numbers_does_not_wait_for_the_device() -> None:
    device = torch.device("cuda", 0)
    cache = KVCache(
        num_layers=1,
        num_blocks=4,
        num_host_blocks=0,
        num_kv_heads=2,
        block_size=8,
        head_dim=4,
        dtype=torch.float32,
        device=device,
    )
    for part in cache.layers[0]:
        part.fill_(1.0)
    feature, logits = ThinkingBudget(2), torch.ones(2, 8, device=device)
    params = SamplingParams(thinking_token_budget=0)
    params._reasoning_markers = ReasoningMarkers((3,), (5,), (5,))
    feature.add(NewRow(1, "a", [2, 3], 2, 0, [], params, 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.clear([1, 3])
        feature.apply(Selection(np.array([1]), np.array([1]), np.array([0])), logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [int(part.cpu().sum()) for part in cache.layers[0]] == [2 * 64, 2 * 64]
    assert logits.cpu().isneginf().tolist() == [[False] * 8, [token != 5 for token in range(8)]]


# What breaks


def test_an_engine_whose_device_works_no_more_is_closed(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    params = SamplingParams(temperature=0, max_tokens=3)
    with make(tiny_llama_path, "cuda") as llm:
        generate(llm, params)
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "submit", fail)
            patch.setattr(torch.cuda, "synchronize", fail)
            patch.setattr(torch.cuda, "empty_cache", fail)
            with pytest.raises(RuntimeError, match="illegal memory access"):
                generate(llm, params)
        assert "could not be given back" in caplog.text
        with pytest.raises(EngineDeadError):
            generate(llm, params)


# Memory


def test_memory_that_libraries_take_at_the_first_step_is_counted(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[int] = []
    taken: list[int] = []
    library_bytes = 0
    profile_cuda, worst_case_bytes, get_info = (
        Worker._profile_cuda,
        profile.worst_case_bytes,
        torch.cuda.mem_get_info,
    )

    def recording(worker: Worker) -> int:
        budgets.append(profile_cuda(worker))
        return budgets[-1]

    def taking(*args: Any) -> int:
        taken.append(library_bytes)
        return worst_case_bytes(*args)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        free, total = get_info(device)
        return free - sum(taken), total

    monkeypatch.setattr(Worker, "_profile_cuda", recording)
    monkeypatch.setattr(profile, "worst_case_bytes", taking)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    make(tiny_llama_path, "cuda", gpu_memory_utilization=0.5).close()
    library_bytes = 256 << 20
    make(tiny_llama_path, "cuda", gpu_memory_utilization=0.5).close()
    assert budgets[0] - budgets[1] > 128 << 20


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a model whose steps take most memory for their logits."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_config("llama", vocab_size=6_000, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"temperature": 0}, {}),
        ({"top_k": 20, "top_p": 0.9, "min_p": 0.001, "seed": 1}, {}),
        ({"top_p": 0.9, "seed": 1, "logprobs": 3, "repetition_penalty": 1.1}, {}),
        ({"temperature": 0, "prompt_logprobs": 5}, {}),
        ({"temperature": 0, "logprobs": -1}, {"max_logprobs": -1}),
        ({"temperature": 0, "prompt_logprobs": -1}, {"max_logprobs": -1}),
        ({"seed": 1}, {"watermark_config": {"key": 42}}),
        ({"extra_args": {"roll": 1}, "top_p": 0.9, "seed": 1, "logprobs": 3}, {"logits_processors": [Rolled]}),
    ],
    ids=str,
)
def test_steps_take_no_more_memory_than_was_counted_on(
    wide_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    counted: list[int] = []
    worst_case_bytes = profile.worst_case_bytes

    def recording(*args: Any) -> int:
        counted.append(worst_case_bytes(*args))
        return counted[-1]

    monkeypatch.setattr(profile, "worst_case_bytes", recording)
    params = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False, **fields)
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.8, **options}
    with make(wide_path, "cuda", max_num_seqs=16, max_num_batched_tokens=16, **options) as llm:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for prompts in ([[number] for number in range(3, 19)], PROMPTS):
            assert len(tokens(generate(llm, params, prompts))) == len(prompts)
        assert 0 < torch.cuda.max_memory_allocated() - held <= counted[0]


def test_sleep_gives_the_memory_of_the_device_back(tiny_llama_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with make(tiny_llama_path, "cuda", kv_cache_memory_bytes=64 << 20) as llm:
        expected = tokens(generate(llm, params))
        [num_bytes] = llm.apply_model(lambda model: sum(weight.nbytes for weight in model.parameters()))
        cache: Any = llm.llm_engine.cache_config
        [block_bytes] = llm.collective_rpc(
            lambda worker: sum(part[0].nbytes for pair in worker.runner.kv_cache.layers for part in pair)
        )
        num_bytes += cache.num_gpu_blocks * block_bytes
        for level in (1, 2):
            awake = torch.cuda.memory_allocated()
            llm.sleep(level)
            assert torch.cuda.memory_allocated() <= awake - num_bytes
            llm.wake_up(["weights"])
            if level == 2:
                llm.collective_rpc("reload_weights")
            llm.wake_up(["kv_cache"])
            assert tokens(generate(llm, params)) == expected
        [weights] = llm.apply_model(lambda model: {"model.norm.weight": model.norm.weight * 0})
        llm.update_weights(weights)
        assert all(len(set(found)) == 1 for found in tokens(generate(llm, params))), "equal logits everywhere"
