"""Sleeping, new weights, calls on the worker, profiles, metrics and the queue, with a tiny model."""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from taco import LLM, EngineArgs, RequestOutput, SamplingParams
from taco.engine.metrics import Counter, Gauge, Histogram
from taco.errors import (
    EngineAsleepError,
    EngineDeadError,
    EngineError,
    OutOfMemoryError,
    ProfilerAlreadyActiveError,
    StatsDisabledError,
    TacoError,
    TacoValidationError,
    UnsupportedFeatureError,
)
from taco.sampling_params import BeamSearchParams, RequestOutputKind

QUIET: dict[str, Any] = {"use_tqdm": False}
PROMPTS = [[5 + (7 * i * n + n) % 250 for i in range(n)] for n in (40, 3, 17, 33)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
Make = Callable[..., LLM]


@pytest.fixture(autouse=True)
def without_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take most of the time of these tests, and nothing depends on them."""
    monkeypatch.setattr("taco.worker.worker.gc.collect", lambda: 0)


@pytest.fixture(scope="module")
def make(tiny_llama_path: Path) -> Make:
    def make(**kwargs: Any) -> LLM:
        defaults = {"dtype": "float32", "kv_cache_memory_bytes": 2 << 20, "max_num_seqs": 8, "swap_space": 0.01}
        return LLM(str(tiny_llama_path), **{**defaults, **kwargs})

    return make


@pytest.fixture
def llm(make: Make) -> Iterator[LLM]:
    with make() as llm:
        yield llm


@pytest.fixture(scope="module")
def old_weights(tiny_llama_path: Path) -> dict[str, torch.Tensor]:
    return LlamaForCausalLM.from_pretrained(tiny_llama_path, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def new_weights(old_weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.dim() == 2 else 1.0)
        for name, tensor in old_weights.items()
    }


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def generate(llm: LLM) -> list[list[int]]:
    return tokens(llm.generate(PROMPTS, GREEDY, **QUIET))


@pytest.fixture(scope="module")
def old_tokens(make: Make) -> list[list[int]]:
    with make() as llm:
        return generate(llm)


@pytest.fixture(scope="module")
def new_tokens(
    make: Make, tiny_llama_path: Path, new_weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    folder = tmp_path_factory.mktemp("new-weights")
    model = LlamaForCausalLM.from_pretrained(tiny_llama_path, dtype=torch.float32)
    model.load_state_dict(new_weights)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama_path / name).read_bytes())
    with LLM(str(folder), dtype="float32", kv_cache_memory_bytes=2 << 20) as llm:
        return generate(llm)


# Sleeping


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def test_memory_of_the_kv_cache_goes_back_and_comes_back(make: Make, old_tokens: list[list[int]]) -> None:
    size = 160 << 20
    with make(kv_cache_memory_bytes=size, max_num_seqs=5000, max_num_batched_tokens=5000) as llm:
        assert generate(llm) == old_tokens
        llm.collective_rpc(lambda worker: [part.add_(0) for pair in worker.runner.kv_cache.layers for part in pair])
        full = resident_bytes()
        llm.sleep(level=1)
        assert resident_bytes() < full - 0.9 * size
        with pytest.raises(EngineAsleepError, match=r"asleep \(kv_cache\); call wake_up\(\) first"):
            generate(llm)
        assert llm.llm_engine.is_sleeping()
        assert llm.wake_up()
        assert not llm.llm_engine.is_sleeping()
        assert generate(llm) == old_tokens


def test_level_2_drops_the_weights_until_they_are_loaded_again(llm: LLM, old_tokens: list[list[int]]) -> None:
    llm.sleep(level=2)
    assert all(llm.apply_model(lambda model: [parameter.is_meta for parameter in model.parameters()])[0])
    with pytest.raises(EngineAsleepError, match=r"kv_cache, weights"):
        generate(llm)
    with pytest.raises(EngineAsleepError, match="weights are asleep"):
        llm.collective_rpc("reload_weights")
    assert not llm.wake_up(tags=["weights"])
    assert llm.llm_engine.is_sleeping()
    llm.collective_rpc("reload_weights")
    with pytest.raises(EngineAsleepError, match=r"asleep \(kv_cache\)"):
        generate(llm)
    assert llm.wake_up(tags=["kv_cache"])
    assert generate(llm) == old_tokens


def test_weights_that_were_dropped_may_come_from_a_trainer(
    llm: LLM, new_weights: dict[str, torch.Tensor], new_tokens: list[list[int]]
) -> None:
    llm.sleep(level=2)
    llm.wake_up()
    items = list(new_weights.items())
    llm.update_weights(items[1:])
    with pytest.raises(EngineAsleepError, match=f"1 tensors are missing .* such as {items[0][0]}"):
        generate(llm)
    llm.update_weights(items[:1])
    assert generate(llm) == new_tokens


def test_sleeping_twice_deeper_and_waking_twice(llm: LLM, old_tokens: list[list[int]]) -> None:
    for level in (1, 1, 2, 1):
        llm.sleep(level)
    assert llm.wake_up() and llm.wake_up()
    llm.collective_rpc("reload_weights")
    assert generate(llm) == old_tokens


def test_level_0_pauses_and_the_kv_cache_alone_can_go(llm: LLM, old_tokens: list[list[int]]) -> None:
    with pytest.raises(TacoValidationError, match=r"call sleep\(level=0\) first"):
        llm.release_kv_cache_memory()
    llm.sleep(level=0)
    with pytest.raises(EngineAsleepError, match=r"paused by sleep\(level=0\)"):
        generate(llm)
    assert llm.wake_up(tags=["scheduling"])
    assert generate(llm) == old_tokens
    llm.sleep(level=0)
    llm.release_kv_cache_memory()
    with pytest.raises(TacoValidationError, match="has all its memory"):
        llm.release_kv_cache_memory()
    assert llm.llm_engine.model_executor is not None and llm.llm_engine.model_executor.asleep == {"kv_cache"}
    assert llm.wake_up(tags=["kv_cache"])
    assert generate(llm) == old_tokens


@pytest.mark.parametrize("limits", [{}, {"async_scheduling": True}, {"num_gpu_blocks_override": 10}], ids=str)
@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_requests_that_were_under_way(
    make: Make, old_tokens: list[list[int]], mode: str, limits: dict[str, Any]
) -> None:
    with make(**limits) as llm:
        engine = llm.llm_engine
        ids = llm.enqueue(PROMPTS, GREEDY)
        for _ in range(6):
            assert engine.step() == []
        llm.sleep(level=1, mode=mode)
        engine.scheduler.check_integrity()
        if mode == "keep":
            with pytest.raises(EngineAsleepError):
                llm.wait_for_completion(**QUIET)
            llm.wake_up()
        outputs = llm.wait_for_completion(**QUIET)  # asleep or not
        assert [output.request_id for output in outputs] == ids
        if mode == "abort":
            assert all(output.outputs[0].finish_reason == "abort" for output in outputs)
            for found, expected in zip(tokens(outputs), old_tokens, strict=True):
                assert found == expected[: len(found)] and len(found) < 12
            assert any(tokens(outputs))
        else:
            assert tokens(outputs) == old_tokens
        llm.wake_up()
        assert generate(llm) == old_tokens
        engine.scheduler.check_integrity()


def test_a_beam_search_that_was_under_way_goes_on(make: Make) -> None:
    params = SamplingParams(use_beam_search=True, n=2, best_of=3, temperature=0, max_tokens=9, ignore_eos=True)
    with make(num_gpu_blocks_override=12) as llm:
        expected = llm.generate(PROMPTS, params, **QUIET)
        llm.enqueue(PROMPTS, params)
        for _ in range(5):
            llm.llm_engine.step()
        llm.sleep(mode="keep")
        llm.llm_engine.scheduler.check_integrity()
        llm.wake_up()
        for found, other in zip(llm.wait_for_completion(**QUIET), expected, strict=True):
            assert [one.token_ids for one in found.outputs] == [one.token_ids for one in other.outputs]


def test_streaming_requests_lose_no_token_to_a_sleep(make: Make, old_tokens: list[list[int]]) -> None:
    with make(async_scheduling=True) as llm:
        engine = llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        engine.add_request("a", {"prompt_token_ids": PROMPTS[0]}, params)
        found: list[int] = []
        for _ in range(5):
            found += [token for output in engine.step() for token in output.outputs[0].token_ids]
        llm.sleep(mode="keep")
        llm.wake_up()
        while engine.has_unfinished_requests():
            found += [token for output in engine.step() for token in output.outputs[0].token_ids]
        assert found == old_tokens[0]


@pytest.mark.parametrize(
    ("arguments", "message"), [({"level": 3}, "level must be 0, 1 or 2"), ({"mode": "stop"}, "mode must be one of")]
)
def test_wrong_arguments_of_sleep(llm: LLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TacoValidationError, match=message):
        llm.sleep(**arguments)
    with pytest.raises(TacoValidationError, match=r"tags can be .* got \['cache'\]"):
        llm.wake_up(tags=["cache"])
    assert not llm.llm_engine.is_sleeping()


def test_memory_that_is_gone_leaves_the_engine_asleep(
    llm: LLM, old_tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.sleep()
    with monkeypatch.context() as patch:

        def fail(*args: object) -> None:
            raise torch.OutOfMemoryError("no memory")

        patch.setattr("taco.worker.kv_cache.lazy_zeros", fail)
        with pytest.raises(OutOfMemoryError, match="kv_cache of an engine that wakes up .* stays asleep"):
            llm.wake_up()
    assert llm.llm_engine.is_sleeping()
    llm.wake_up()
    assert generate(llm) == old_tokens


def test_a_pooling_model_sleeps_too(make: Make) -> None:
    with make(task="embed") as llm:
        expected = [output.outputs.embedding for output in llm.embed(PROMPTS, **QUIET)]
        llm.sleep(level=2)
        with pytest.raises(EngineAsleepError):
            llm.embed(PROMPTS, **QUIET)
        llm.wake_up()
        llm.collective_rpc("reload_weights")
        assert [output.outputs.embedding for output in llm.embed(PROMPTS, **QUIET)] == expected


# Weights


def test_new_weights_hold_at_once_and_old_prefixes_are_forgotten(
    llm: LLM,
    new_weights: dict[str, torch.Tensor],
    old_weights: dict[str, torch.Tensor],
    old_tokens: list[list[int]],
    new_tokens: list[list[int]],
) -> None:
    assert generate(llm) == old_tokens
    llm.update_weights(new_weights)
    assert generate(llm) == new_tokens
    executor: Any = llm.llm_engine.model_executor
    executor.driver_worker.model_runner.model.load_weights(old_weights.items())
    assert generate(llm) == old_tokens
    assert llm.collective_rpc("load_weights", args=(iter(new_weights.items()),)) == [set(new_weights)]
    assert generate(llm) == new_tokens
    llm.apply_model(lambda model: model.load_weights(old_weights))
    assert generate(llm) == old_tokens


def test_requests_under_way_go_on_with_new_weights(
    make: Make, new_weights: dict[str, torch.Tensor], old_tokens: list[list[int]], new_tokens: list[list[int]]
) -> None:
    with make(async_scheduling=True) as llm:
        llm.enqueue(PROMPTS, GREEDY)
        for _ in range(6):
            llm.llm_engine.step()
        llm.update_weights(new_weights)
        outputs = llm.wait_for_completion(**QUIET)
        longer = [
            (prompt + found, 12 - count)
            for prompt, found in zip(PROMPTS, tokens(outputs), strict=True)
            for count in [next((n for n in range(12, 0, -1) if found[:n] in [old[:n] for old in old_tokens]), 0)]
        ]
        assert all(0 < rest < 12 for _, rest in longer)
        # What came after the update is what the new weights make of the prompt and the tokens before it.
        prompts = [ids[: len(ids) - rest] for ids, rest in longer]
        params = [SamplingParams(temperature=0, max_tokens=rest, ignore_eos=True) for _, rest in longer]
        expected = [ids[len(ids) - rest :] for ids, rest in longer]
        assert tokens(llm.generate(prompts, params, **QUIET)) == expected
        assert generate(llm) == new_tokens


def test_a_weight_update_in_pieces(llm: LLM, new_weights: dict[str, torch.Tensor], new_tokens: list[list[int]]) -> None:
    with pytest.raises(TacoValidationError, match="no weight update to finish"):
        llm.finish_weight_update()
    assert llm.get_weight_version() == "default"
    llm.start_weight_update()
    for item in new_weights.items():
        llm.update_weights([item])
        with pytest.raises(EngineAsleepError, match=r"call finish_weight_update\(\) first"):
            generate(llm)
    llm.finish_weight_update("step 7")
    assert llm.get_weight_version() == "step 7"
    assert generate(llm) == new_tokens
    llm.update_weight_version("step 8")
    assert llm.get_weight_version() == "step 8"


def test_weights_of_other_processes_are_refused_by_name(llm: LLM) -> None:
    with pytest.raises(UnsupportedFeatureError, match="another process"):
        llm.init_weight_transfer_engine({"init_info": {}})
    with pytest.raises(UnsupportedFeatureError, match="pass the tensors themselves"):
        llm.update_weights({"update_info": {"names": []}})
    with pytest.raises(UnsupportedFeatureError, match="no draft model"):
        llm.start_draft_weight_update()


def test_wrong_weights_change_nothing(
    llm: LLM, new_weights: dict[str, torch.Tensor], old_tokens: list[list[int]]
) -> None:
    with pytest.raises(TacoValidationError, match="x.weight is not among the weights"):
        llm.update_weights({**new_weights, "x.weight": torch.zeros(1)})
    assert generate(llm) == old_tokens


# Prefix cache


def num_cached(outputs: list[RequestOutput]) -> list[int | None]:
    return [output.num_cached_tokens for output in outputs]


def test_reset_prefix_cache(llm: LLM, old_tokens: list[list[int]]) -> None:
    llm.generate(PROMPTS, GREEDY, **QUIET)
    assert any(num_cached(llm.generate(PROMPTS, GREEDY, **QUIET)))
    assert llm.reset_prefix_cache() is True
    outputs = llm.generate(PROMPTS, GREEDY, **QUIET)
    assert not any(num_cached(outputs)) and tokens(outputs) == old_tokens
    llm.enqueue(PROMPTS, GREEDY)
    for _ in range(5):
        llm.llm_engine.step()
    assert llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True) is True
    assert not llm.llm_engine.scheduler.running
    outputs = llm.wait_for_completion(**QUIET)
    assert tokens(outputs) == old_tokens
    assert all(output.metrics is not None and output.metrics.num_preemptions == 1 for output in outputs)
    llm.reset_mm_cache()


# Calls on the worker


class Extension:
    """What a program adds to the worker."""

    def describe(self: Any, word: str, *, times: int = 1) -> str:
        return f"{word * times} {self.device.type} {self.rank} {type(self.model_runner.model).__name__}"


class Conflicting:
    def load_weights(self) -> None: ...


@pytest.mark.parametrize("extension", [Extension, f"{__name__}.Extension"])
def test_methods_of_an_extension_are_the_workers(make: Make, extension: Any) -> None:
    with make(worker_extension_cls=extension) as llm:
        found = llm.collective_rpc("describe", timeout=3.0, args=("ab",), kwargs={"times": 2})
        assert found == ["abab cpu 0 LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        (Conflicting, r"the worker has \['load_weights'\] itself"),
        ("no.such.Class", "cannot be imported"),
        (f"{__name__}.Missing", "cannot be imported"),
        ("Name", "must be a class or its name"),
    ],
)
def test_wrong_extensions(make: Make, extension: Any, message: str) -> None:
    with pytest.raises(TacoValidationError, match=message):
        make(worker_extension_cls=extension)


def test_functions_are_called_with_worker_and_model(llm: LLM) -> None:
    assert llm.collective_rpc(lambda worker, a, b: (worker.device.type, a, b), args=(1,), kwargs={"b": 2}) == [
        ("cpu", 1, 2)
    ]
    assert llm.apply_model(lambda model: (model.num_layers, model.training)) == [(2, False)]
    assert llm.get_world_size() == 1 == llm.get_world_size(include_dp=False)
    with pytest.raises(TacoValidationError, match="worker has no method 'fly'"):
        llm.collective_rpc("fly")
    with pytest.raises(ZeroDivisionError):
        llm.apply_model(lambda model: 1 // 0)


def test_a_closed_llm_says_so(make: Make) -> None:
    llm = make()
    llm.close()
    for call in (llm.sleep, llm.wake_up, llm.get_metrics, llm.reset_prefix_cache, llm.wait_for_completion):
        with pytest.raises(EngineDeadError):
            call()
    with pytest.raises(EngineDeadError):
        llm.llm_engine.check_health()


# Profiling


def traces(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("*.pt.trace.json*"))
    texts = [gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in paths]
    return [json.loads(text) for text in texts]


def test_a_profile_is_written_to_the_folder_of_the_argument(make: Make, tmp_path: Path) -> None:
    config = {"profiler": "torch", "torch_profiler_dir": str(tmp_path / "a" / "b"), "torch_profiler_with_stack": False}
    with make(profiler_config=config) as llm:
        llm.start_profile("first")
        with pytest.raises(ProfilerAlreadyActiveError):
            llm.start_profile()
        generate(llm)
        llm.stop_profile()
        llm.stop_profile()  # warns
        [path] = (tmp_path / "a" / "b").iterdir()
        assert re.fullmatch(r"first_rank0\.\d+\.pt\.trace\.json\.gz", path.name)
        [trace] = traces(path.parent)
        assert any("aten::" in event["name"] for event in trace["traceEvents"])


def test_a_profile_may_begin_late_and_end_early(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_TORCH_PROFILER_DIR", str(tmp_path))
    monkeypatch.setenv("VLLM_TORCH_PROFILER_WITH_STACK", "0")
    caplog.set_level(logging.WARNING)
    with make() as llm:
        counts = []
        for limits in ({}, {"delay_iterations": 4}, {"delay_iterations": 4, "max_iterations": 3}):
            llm.start_profile(profiler_kwargs={"record_shapes": True}, **limits)
            generate(llm)
            llm.stop_profile()
            newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            trace = json.loads(gzip.decompress(newest.read_bytes()))
            counts.append(sum(event["name"] == "aten::cos" for event in trace["traceEvents"]))
            newest.unlink()
        assert counts[0] > counts[1] > counts[2] > 0
        with pytest.raises(TacoValidationError, match="delay_iterations must be at least 0"):
            llm.start_profile(delay_iterations=-1)
        llm.start_profile(delay_iterations=1000)
        generate(llm)
        llm.stop_profile()
        assert not list(tmp_path.iterdir())
        assert "No trace was written" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"profiler": "torch"}, "must have a folder"),
        ({"torch_profiler_dir": "x", "profiler": "cuda"}, "profiler='cuda' is not supported"),
        ({"torch_profiler_dir": "x", "speed": 1}, "speed=1 is not supported"),
        ({"torch_profiler_dir": "x", "delay_iterations": True}, "delay_iterations must be of type int"),
        ({"torch_profiler_dir": "x", "max_iterations": -1}, "max_iterations must be at least 0"),
    ],
)
def test_wrong_profiler_configs(make: Make, config: dict[str, Any], message: str) -> None:
    with pytest.raises(TacoValidationError, match=message):
        make(profiler_config=config)


def test_without_a_folder_there_is_no_profile(llm: LLM) -> None:
    with pytest.raises(EngineError, match="Profiler is not enabled"):
        llm.start_profile()
    with pytest.raises(RuntimeError, match="Profiler is not enabled"):
        llm.stop_profile()


# Metrics


def by_name(llm: LLM) -> dict[str, Any]:
    return {
        metric.name + (":" + reason if (reason := metric.labels.get("finished_reason")) else ""): metric
        for metric in llm.get_metrics()
    }


def test_metrics_count_what_happened(make: Make) -> None:
    with make(disable_log_stats=False, served_model_name="tiny") as llm:
        assert llm.llm_engine.log_stats
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        llm.generate(PROMPTS, params, **QUIET)
        second = llm.generate(PROMPTS[:2], SamplingParams(n=2, seed=1, max_tokens=7, ignore_eos=True), **QUIET)
        metrics = by_name(llm)
        assert {metric.labels["model_name"] for metric in metrics.values()} == {"tiny"}
        lengths = [len(prompt) for prompt in PROMPTS]
        num_prompt = sum(lengths) + 2 * sum(lengths[:2])
        num_output = 4 * 5 + 2 * 2 * 7
        for name, value in {
            "vllm:prompt_tokens": num_prompt,
            "vllm:prompt_tokens_total": num_prompt,
            "vllm:generation_tokens": num_output,
            "vllm:generation_tokens_total": num_output,
            "vllm:prefix_cache_queries": num_prompt,
            "vllm:num_preemptions": 0,
            "vllm:request_success:length": 4 + 2 * 2,
            "vllm:request_success_total:stop": 0,
        }.items():
            assert isinstance(metrics[name], Counter) and metrics[name].value == value, name
        assert metrics["vllm:prefix_cache_hits"].value >= sum(output.num_cached_tokens or 0 for output in second) > 0
        for name in ("num_requests_running", "num_requests_waiting", "num_requests_swapped", "cpu_cache_usage_perc"):
            assert metrics[f"vllm:{name}"] == Gauge(f"vllm:{name}", metrics[f"vllm:{name}"].labels, 0.0)
        steps = metrics["vllm:iteration_tokens_total"]
        assert isinstance(steps, Histogram) and steps.sum <= num_prompt + num_output
        for name, count, total in [
            ("request_prompt_tokens", 6, sum(lengths) + sum(lengths[:2])),
            ("request_generation_tokens", 6, num_output),
            ("request_params_n", 6, 8),
            ("inter_token_latency_seconds", num_output - 8, None),
            ("time_per_output_token_seconds", num_output - 8, None),
            ("time_to_first_token_seconds", 6, None),
            ("e2e_request_latency_seconds", 6, None),
        ]:
            histogram = metrics[f"vllm:{name}"]
            assert isinstance(histogram, Histogram) and histogram.count == count, name
            assert total is None or histogram.sum == total
            assert list(histogram.buckets)[-1] == "+Inf" and histogram.buckets["+Inf"] == count
            assert sorted(histogram.buckets.values()) == list(histogram.buckets.values())
        assert metrics["vllm:request_prompt_tokens"].buckets["20.0"] == 2 + 1
        assert not llm.llm_engine._metrics._last_token_time  # type: ignore[union-attr]


def test_gauges_show_requests_and_memory_in_use(make: Make) -> None:
    with make(disable_log_stats=False, max_num_seqs=2) as llm:
        llm.enqueue(PROMPTS, GREEDY)
        llm.llm_engine.step()
        metrics = by_name(llm)
        assert metrics["vllm:num_requests_running"].value == 2
        assert metrics["vllm:num_requests_waiting"].value == 2
        assert 0 < metrics["vllm:kv_cache_usage_perc"].value == metrics["vllm:gpu_cache_usage_perc"].value < 1
        llm.sleep(mode="abort")
        assert by_name(llm)["vllm:request_success:abort"].value == 4
        assert not llm.llm_engine._metrics._last_token_time  # type: ignore[union-attr]


def test_preemptions_and_swapped_requests_are_counted(make: Make) -> None:
    with make(disable_log_stats=False, num_gpu_blocks_override=10, preemption_mode="swap") as llm:
        llm.enqueue(PROMPTS, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        seen = 0.0
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            metrics = by_name(llm)
            seen = max(seen, metrics["vllm:num_requests_swapped"].value)
            assert (metrics["vllm:num_requests_swapped"].value > 0) == (metrics["vllm:cpu_cache_usage_perc"].value > 0)
        assert seen > 0 and metrics["vllm:num_preemptions"].value > 0
        assert metrics["vllm:prompt_tokens"].value == sum(map(len, PROMPTS))


def test_pooling_requests_are_counted(make: Make) -> None:
    with make(disable_log_stats=False, task="embed") as llm:
        llm.embed(PROMPTS, **QUIET)
        metrics = by_name(llm)
        assert metrics["vllm:prompt_tokens"].value == sum(map(len, PROMPTS))
        assert metrics["vllm:request_success:stop"].value == 4


def test_a_line_is_logged_from_time_to_time(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="taco.engine.metrics")
    with make(disable_log_stats=False) as llm:
        generate(llm)
        assert not [record for record in caplog.records if record.name == "taco.engine.metrics"]
        llm.llm_engine.do_log_stats()
        assert re.search(r"[1-9][\d.]* prompt tokens/s, [1-9][\d.]* generated tokens/s; 0 requests", caplog.text)
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "1e-9")
    caplog.clear()
    with make(disable_log_stats=False) as llm:
        generate(llm)
        assert len(caplog.records) > 5
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "often")
    with pytest.raises(TacoValidationError, match="VLLM_LOG_STATS_INTERVAL is 'often'"):
        make(disable_log_stats=False)


def test_llm_counts_nothing_unless_it_is_told_to(llm: LLM, tiny_llama_path: Path) -> None:
    for error in (AssertionError, ValueError, StatsDisabledError):
        with pytest.raises(error, match="Stat logging disabled"):
            llm.get_metrics()
    llm.llm_engine.do_log_stats()
    with LLM.from_engine_args(EngineArgs(str(tiny_llama_path), kv_cache_memory_bytes=2 << 20)) as other:
        assert other.get_metrics()


# The queue


def test_what_was_enqueued_runs_together_and_comes_back_in_order(llm: LLM, old_tokens: list[list[int]]) -> None:
    ids = llm.enqueue(iter(PROMPTS[:2]), GREEDY)
    ids += llm.enqueue(PROMPTS[2:], [GREEDY, GREEDY], priority=0)
    assert all(re.fullmatch(rf"{index}-[0-9a-f]{{8}}", request_id) for index, request_id in enumerate(ids))
    with pytest.raises(TacoError, match="wait_for_completion"):
        generate(llm)
    outputs = llm.wait_for_completion(RequestOutput, **QUIET)
    assert [output.request_id for output in outputs] == ids
    assert tokens(outputs) == old_tokens
    assert llm.wait_for_completion(**QUIET) == []
    assert llm.generate(PROMPTS[0], GREEDY, **QUIET)[0].request_id == "4"


def test_conversations_are_enqueued(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("hello", "the cat")]
    expected = llm.chat(conversations, GREEDY, **QUIET)
    for messages in (conversations, iter(conversations)):
        assert len(llm.enqueue_chat(messages, GREEDY)) == 2
        outputs = llm.wait_for_completion(**QUIET)
        assert tokens(outputs) == tokens(expected)
        assert [output.prompt for output in outputs] == [output.prompt for output in expected]


def test_a_bad_row_keeps_all_from_the_queue(llm: LLM) -> None:
    with pytest.raises(TacoValidationError, match="row 1"):
        llm.enqueue([PROMPTS[0], [], PROMPTS[1]], GREEDY)
    assert llm.wait_for_completion(**QUIET) == []


def test_an_interrupt_keeps_all_from_the_queue(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    add, calls = llm.llm_engine.add_processed, iter(range(9))

    def interrupted(processed: Any) -> None:
        add(processed)
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(llm.llm_engine, "add_processed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.enqueue(PROMPTS, GREEDY)
    assert not llm.llm_engine.has_unfinished_requests()
    assert llm.wait_for_completion(**QUIET) == []


def test_a_row_that_fails_while_it_runs_comes_back_with_its_error(llm: LLM, old_tokens: list[list[int]]) -> None:
    def fail(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    bad = SamplingParams(temperature=0, max_tokens=12, logits_processors=[fail])
    llm.enqueue(PROMPTS, [GREEDY, bad, GREEDY, GREEDY])
    outputs = llm.wait_for_completion(**QUIET)
    assert outputs[1].outputs[0].finish_reason == "error" and "no" in outputs[1].error
    assert tokens(outputs[:1] + outputs[2:]) == old_tokens[:1] + old_tokens[2:]


def test_other_output_types_are_type_errors(llm: LLM) -> None:
    llm.enqueue(PROMPTS[0], GREEDY)
    with pytest.raises(TypeError, match="Expected outputs of the type"):
        llm.wait_for_completion(int, **QUIET)
    assert not llm.llm_engine.has_unfinished_requests()


def test_what_was_aborted_is_not_waited_for(llm: LLM, old_tokens: list[list[int]]) -> None:
    ids = llm.enqueue(PROMPTS, GREEDY)
    llm.llm_engine.abort_request(ids[1])
    outputs = llm.wait_for_completion(**QUIET)
    assert [output.request_id for output in outputs] == [ids[0], ids[2], ids[3]]


def test_beam_search_works_after_a_sleep(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=5)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    expected = llm.beam_search(prompts, params)
    llm.sleep()
    llm.wake_up()
    for found, other in zip(llm.beam_search(prompts, params), expected, strict=True):
        assert [one.tokens for one in found.sequences] == [one.tokens for one in other.sequences]
