"""The engine for coroutines, with a tiny model: many consumers, cancellation, failures, several event loops."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from taco import LLM, AsyncEngineArgs, AsyncLLMEngine, PoolingParams, SamplingParams
from taco.engine.grammar_gate import GrammarGate
from taco.engine.metrics import Counter
from taco.errors import EngineDeadError, EngineError, TacoValidationError, UnsupportedFeatureError
from taco.executor.inprocess import InProcessExecutor
from taco.outputs import RequestOutput
from taco.sampling_params import RequestOutputKind
from tests.entrypoints.conftest import tiny_llama_path  # noqa: F401

PROMPTS = [[5 + (7 * i * n + n) % 250 for i in range(n)] for n in (40, 3, 17, 33, 1, 16, 25, 8)]
FINAL = RequestOutputKind.FINAL_ONLY
DELTA = RequestOutputKind.DELTA
SMALL: dict[str, Any] = {"dtype": "float32", "kv_cache_memory_bytes": 2 << 20, "max_num_seqs": 4, "swap_space": 0.01}
Make = Callable[..., AsyncLLMEngine]


@pytest.fixture(autouse=True)
def without_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take most of the time of these tests, and nothing depends on them."""
    monkeypatch.setattr("taco.worker.worker.gc.collect", lambda: 0)


@pytest.fixture
def make(tiny_llama_path: Path) -> Iterator[Make]:  # noqa: F811
    made: list[weakref.ref[AsyncLLMEngine]] = []

    def make(**kwargs: Any) -> AsyncLLMEngine:
        engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(str(tiny_llama_path), **{**SMALL, **kwargs}))
        made.append(weakref.ref(engine))
        return engine

    yield make
    for reference in made:
        if (engine := reference()) is not None:
            engine.shutdown()


@pytest.fixture
def engine(make: Make) -> AsyncLLMEngine:
    return make()


@pytest.fixture
def slow(engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes steps slow enough that coroutines can act between them, and counts them (in a list of one number)."""
    count = [0]
    submit = engine.engine.model_executor.submit  # type: ignore[union-attr]

    def slow_submit(plan: Any) -> Any:
        count[0] += bool(plan.rows)
        time.sleep(0.003)
        return submit(plan)

    monkeypatch.setattr(engine.engine.model_executor, "submit", slow_submit)
    return count


@pytest.fixture(scope="module")
def expected(tiny_llama_path: Path) -> list[list[int]]:  # noqa: F811
    with LLM(str(tiny_llama_path), **SMALL) as llm:
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def greedy(max_tokens: int = 12, output_kind: RequestOutputKind = FINAL, **kwargs: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, output_kind=output_kind, **kwargs)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 120))


async def consume(engine: AsyncLLMEngine, number: int, params: SamplingParams | None = None) -> list[int]:
    """Tokens of a prompt, however they are yielded."""
    params = params or greedy()
    token_ids: list[int] = []
    finished = False
    async for output in engine.generate({"prompt_token_ids": PROMPTS[number]}, params, f"request {number}"):
        assert not finished
        new = list(output.outputs[0].token_ids)
        token_ids = token_ids + new if params.output_kind is DELTA else new
        finished = output.finished
    assert finished
    return token_ids


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def is_empty(engine: AsyncLLMEngine) -> bool:
    scheduler = engine.engine.scheduler
    return not scheduler.requests and scheduler.blocks.pool.num_free == scheduler.blocks.num_usable_blocks


# Requests


@pytest.mark.parametrize("limits", [{}, {"async_scheduling": True}], ids=str)
@pytest.mark.parametrize("kind", RequestOutputKind)
def test_consumers_of_one_loop_share_the_engine(
    make: Make, expected: list[list[int]], kind: RequestOutputKind, limits: dict[str, Any]
) -> None:
    engine = make(**limits)

    async def main() -> list[list[int]]:
        return list(await asyncio.gather(*(consume(engine, n, greedy(output_kind=kind)) for n in range(len(PROMPTS)))))

    assert run(main()) == expected
    assert is_empty(engine)


def test_tokens_are_yielded_as_they_come(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    async def main() -> list[int]:
        lengths = []
        params = greedy(output_kind=RequestOutputKind.CUMULATIVE)
        async for output in engine.generate({"prompt_token_ids": PROMPTS[0]}, params, "a"):
            lengths.append(len(output.outputs[0].token_ids))
            assert output.outputs[0].token_ids == expected[0][: lengths[-1]]
        return lengths

    lengths = run(main())
    assert lengths == sorted(set(lengths)) and lengths[-1] == 12 and len(lengths) > 1


def test_a_slow_consumer_gets_every_token(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    async def main(kind: RequestOutputKind) -> tuple[list[int], int]:
        found: list[int] = []
        number = 0
        async for output in engine.generate({"prompt_token_ids": PROMPTS[0]}, greedy(output_kind=kind), "a"):
            number += 1
            found = output.outputs[0].token_ids if kind is not DELTA else found + list(output.outputs[0].token_ids)
            await until(lambda: engine.get_num_unfinished_requests() == 0)
        return found, number

    assert run(main(DELTA)) == (expected[0], 12)
    found, number = run(main(RequestOutputKind.CUMULATIVE))
    assert found == expected[0] and number < 12


def test_many_consumers_at_once(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    async def one(number: int) -> bool:
        index = number % len(PROMPTS)
        [output] = [
            output
            async for output in engine.generate({"prompt_token_ids": PROMPTS[index]}, greedy(), f"request {number}")
        ]
        return bool(output.outputs[0].token_ids == expected[index])

    async def main() -> list[bool]:
        return list(await asyncio.gather(*map(one, range(300))))

    assert all(run(main()))


def test_several_event_loops_at_once_and_one_after_the_other(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    found: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: run(consume(engine, n))}))  # type: ignore[misc]
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4, len(PROMPTS)):
        found[number] = run(consume(engine, number))
    assert [found[n] for n in range(len(PROMPTS))] == expected


def test_the_event_loop_goes_on_while_steps_run(engine: AsyncLLMEngine) -> None:
    async def main() -> int:
        ticks = 0
        task = asyncio.ensure_future(consume(engine, 0, greedy(60)))
        while not task.done():
            await asyncio.sleep(0)
            ticks += 1
        await task
        return ticks

    assert run(main()) > 60


@pytest.mark.usefixtures("slow")
def test_invalid_requests_fail_alone(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    async def bad() -> None:
        async for _ in engine.generate({"prompt_token_ids": [10**6]}, greedy(), "bad"):
            pass

    async def twice() -> None:
        first = asyncio.ensure_future(consume(engine, 1, greedy(100)))
        await until(lambda: engine.get_num_unfinished_requests() == 1)
        with pytest.raises(TacoValidationError, match="is in use"):
            await consume(engine, 1)
        assert (await first)[:12] == expected[1]

    async def main() -> list[Any]:
        return await asyncio.gather(bad(), consume(engine, 0), return_exceptions=True)

    error, found = run(main())
    assert isinstance(error, TacoValidationError) and "out of vocabulary" in str(error)
    assert found == expected[0]
    run(twice())


def test_a_row_that_fails_while_it_runs_is_yielded_with_its_error(
    engine: AsyncLLMEngine, expected: list[list[int]]
) -> None:
    def fail(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    async def bad() -> Any:
        outputs = engine.generate({"prompt_token_ids": PROMPTS[1]}, greedy(logits_processors=[fail]), "bad")
        return [output async for output in outputs][-1]

    async def main() -> Any:
        return await asyncio.gather(bad(), consume(engine, 0))

    output, found = run(main())
    assert output.outputs[0].finish_reason == "error" and found == expected[0]


def test_add_request_returns_the_iterator(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    async def main() -> list[int]:
        outputs = await engine.add_request("a", {"prompt_token_ids": PROMPTS[2]}, greedy())
        return [output async for output in outputs][-1].outputs[0].token_ids

    assert run(main()) == expected[2]


def test_parameters_of_either_version(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    async def last(outputs: Any) -> Any:
        return [output async for output in outputs][-1]

    async def main() -> None:
        older = await last(await engine.add_request("a", inputs={"prompt_token_ids": PROMPTS[2]}, params=greedy()))
        assert older.outputs[0].token_ids == expected[2] and older.prompt is None
        newer = await last(engine.generate(PROMPTS[2], greedy(), "b", prompt_text="shown", data_parallel_rank=0))
        assert newer.outputs[0].token_ids == expected[2] and newer.prompt == "shown"
        too_long = await last(engine.generate([5] * 10_000, greedy(), "b", prompt_text="shown"))
        assert not too_long.outputs[0].token_ids and too_long.prompt == "shown"
        options: dict[str, Any] = {
            "data_parallel_rank": 1,
            "session_id": "s",
            "kv_hints": {},
            "reasoning_ended": False,
            "reasoning_parser_kwargs": {},
        }
        for name, value in options.items():
            with pytest.raises(UnsupportedFeatureError, match=name):
                await last(engine.generate(PROMPTS[2], greedy(), "c", **{name: value}))
            with pytest.raises(UnsupportedFeatureError, match=name):
                await last(await engine.add_request("c", PROMPTS[2], greedy(), **{name: value}))
        with pytest.raises(UnsupportedFeatureError, match="reasoning_ended"):
            await last(engine.encode(PROMPTS[2], PoolingParams(), "c", reasoning_ended=True))

    run(main())


@pytest.mark.parametrize("options", [{}, {"prompt": [1], "inputs": [1]}, {"prompt": [1], "prompt_text": 1}])
def test_a_request_has_one_prompt(engine: AsyncLLMEngine, options: dict[str, Any]) -> None:
    with pytest.raises(TacoValidationError, match="prompt"):
        engine.engine.add_request("a", params=greedy(), **options)
    assert not engine.engine.has_unfinished_requests()


def test_requests_are_aborted_by_either_name(engine: AsyncLLMEngine) -> None:
    inner = engine.engine
    for request_id in "abc":
        inner.add_request(request_id, {"prompt_token_ids": [5]}, greedy())
    inner.abort_request(request_id="a")
    inner.abort_request(request_ids=["b"])
    assert inner.get_num_unfinished_requests() == 1
    for wrong in ({}, {"request_id": "c", "request_ids": ["c"]}):
        with pytest.raises(TacoValidationError, match="request_ids"):
            inner.abort_request(**wrong)  # type: ignore[arg-type]
    inner.abort_request("c")
    assert not inner.has_unfinished_requests()


@pytest.mark.usefixtures("slow")
def test_the_engine_can_be_drained(engine: AsyncLLMEngine) -> None:
    async def main() -> None:
        await engine.wait_for_requests_to_drain(0)
        request = asyncio.ensure_future(consume(engine, 1, greedy(60)))
        await until(lambda: engine.get_num_unfinished_requests() == 1)
        with pytest.raises(TimeoutError, match="1 requests"):
            await engine.wait_for_requests_to_drain(0)
        await engine.wait_for_requests_to_drain()
        assert engine.get_num_unfinished_requests() == 0
        assert len(await request) == 60

    run(main())


def test_pooling_models_encode(make: Make, tiny_llama_path: Path) -> None:  # noqa: F811
    engine = make(task="embed")

    async def one(number: int) -> list[float]:
        outputs = engine.encode({"prompt_token_ids": PROMPTS[number]}, PoolingParams(), f"request {number}")
        [output] = [output async for output in outputs]
        return output.outputs.data.tolist()

    async def main() -> list[list[float]]:
        assert await engine.get_supported_tasks() == engine.engine.get_supported_tasks()
        return list(await asyncio.gather(*map(one, range(4))))

    with LLM(str(tiny_llama_path), task="embed", **SMALL) as llm:
        expected = [output.outputs.embedding for output in llm.embed(PROMPTS[:4], use_tqdm=False)]
    torch.testing.assert_close(torch.tensor(run(main())), torch.tensor(expected))


# Ends


async def start(engine: AsyncLLMEngine, number: int) -> Any:
    """An iterator that has yielded once, with many tokens to come."""
    outputs = engine.generate({"prompt_token_ids": PROMPTS[number]}, greedy(80, DELTA), f"request {number}")
    await outputs.__anext__()
    return outputs


def test_a_consumer_that_is_cancelled_frees_its_kv_cache(
    engine: AsyncLLMEngine, expected: list[list[int]], slow: list[int]
) -> None:
    async def main() -> None:
        tasks = [asyncio.ensure_future(consume(engine, n, greedy(80))) for n in range(6)]
        other = asyncio.ensure_future(consume(engine, 6))
        await until(lambda: len(engine.engine.scheduler.running) == 4)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert await other == expected[6]
        await until(lambda: is_empty(engine))

    run(main())
    assert slow[0] < 80, "the requests ran to their end"


def test_a_consumer_that_leaves_its_loop_frees_its_kv_cache(engine: AsyncLLMEngine, slow: list[int]) -> None:
    async def main() -> None:
        async for _ in engine.generate({"prompt_token_ids": PROMPTS[0]}, greedy(80, DELTA), "a"):
            break
        await until(lambda: is_empty(engine))
        outputs = await start(engine, 1)
        await outputs.aclose()
        await until(lambda: is_empty(engine))

    run(main())
    assert slow[0] < 80


def test_requests_of_a_closed_event_loop_end(
    engine: AsyncLLMEngine, expected: list[list[int]], slow: list[int]
) -> None:
    loop = asyncio.new_event_loop()
    outputs = loop.run_until_complete(start(engine, 0))
    loop.close()
    run(until(lambda: is_empty(engine)))
    assert slow[0] < 80
    del outputs
    assert run(consume(engine, 0)) == expected[0]


@pytest.mark.usefixtures("slow")
def test_abort_yields_what_there_is(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    async def main() -> Any:
        outputs = await start(engine, 0)
        other = asyncio.ensure_future(consume(engine, 1))
        await engine.abort("request 0")
        await engine.abort(["request 0", "unknown"])
        assert await other == expected[1]
        return [output async for output in outputs][-1]

    output = run(main())
    assert output.finished and output.outputs[0].finish_reason == "abort"
    assert is_empty(engine)


@pytest.mark.usefixtures("slow")
def test_a_failing_step_reaches_every_consumer_and_no_later_one(
    engine: AsyncLLMEngine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> list[Any]:
        iterators = [await start(engine, n) for n in range(3)]

        def fail(plan: object) -> None:
            raise RuntimeError("a broken kernel")

        with monkeypatch.context() as patch:
            patch.setattr(engine.engine.model_executor, "submit", fail)
            results = await asyncio.gather(*map(rest, iterators), consume(engine, 5), return_exceptions=True)
        return list(results)

    async def rest(outputs: Any) -> list[Any]:
        return [output async for output in outputs]

    errors = run(main())
    assert len(set(map(id, errors))) == 4
    for error in errors:
        assert isinstance(error, EngineError) and "RuntimeError: a broken kernel" in str(error)
        assert isinstance(error.__cause__, RuntimeError)
    assert not engine.errored and engine.is_running
    assert run(consume(engine, 0)) == expected[0]


@pytest.mark.usefixtures("slow")
def test_an_engine_that_cannot_be_repaired_after_a_step_ends(
    engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        outputs = await start(engine, 0)

        def fail(*args: object) -> None:
            raise RuntimeError("a broken device")

        monkeypatch.setattr(engine.engine.model_executor, "submit", fail)
        monkeypatch.setattr(engine.engine.model_executor, "reset", fail)
        with pytest.raises(EngineError, match="RuntimeError: a broken device"):
            _ = [output async for output in outputs]
        await until(lambda: engine.errored)
        with pytest.raises(EngineDeadError, match="a broken device"):
            await consume(engine, 1)

    run(main())


@pytest.mark.usefixtures("slow")
def test_an_engine_that_fails_for_good_says_so_to_everyone(
    engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        outputs = await start(engine, 0)

        def fail() -> None:
            raise MemoryError("no memory to clean up")

        monkeypatch.setattr(engine.engine, "why_idle", fail)
        with pytest.raises(EngineDeadError, match="MemoryError: no memory to clean up"):
            _ = [output async for output in outputs]
        for call in (consume(engine, 1), engine.sleep(), engine.check_health()):
            with pytest.raises(EngineDeadError, match="MemoryError"):
                await call

    run(main())
    assert engine.errored and engine.is_stopped and isinstance(engine.dead_error, EngineDeadError)


@pytest.mark.usefixtures("slow")
def test_shutdown_ends_requests_and_gives_memory_back(engine: AsyncLLMEngine) -> None:
    async def main() -> None:
        outputs = await start(engine, 0)
        engine.shutdown()
        with pytest.raises(EngineDeadError, match="was shut down"):
            _ = [output async for output in outputs]
        for call in (consume(engine, 1), engine.sleep(), engine.check_health(), engine.abort("a")):
            with pytest.raises(EngineDeadError, match="was shut down"):
                await call

    run(main())
    engine.shutdown()
    assert engine.is_stopped and not engine.is_running and not engine.errored
    assert engine.engine.model_executor is None


def test_an_engine_that_was_never_used_can_be_shut_down(engine: AsyncLLMEngine) -> None:
    engine.shutdown()
    assert engine.engine.model_executor is None


def test_deleting_the_engine_ends_its_thread(make: Make) -> None:
    engine = make()
    run(consume(engine, 0))
    inner = weakref.ref(engine.engine)
    thread = engine._thread._thread
    assert thread is not None and thread.is_alive()
    del engine
    gc.collect()
    assert not thread.is_alive()
    del thread
    gc.collect()
    assert inner() is None


def test_a_program_that_ends_with_requests_under_way_ends(tiny_llama_path: Path) -> None:  # noqa: F811
    code = f"""
import asyncio
from taco import AsyncEngineArgs, AsyncLLMEngine, SamplingParams
engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs({str(tiny_llama_path)!r}, **{SMALL!r}))
loop = asyncio.new_event_loop()
outputs = engine.generate({{"prompt_token_ids": [5, 6]}}, SamplingParams(max_tokens=100, ignore_eos=True), "a")
print(loop.run_until_complete(outputs.__anext__()).finished)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "False" and result.returncode == 0
    assert "Traceback" not in result.stderr and "core dumped" not in result.stderr


# Between steps


@pytest.mark.usefixtures("slow")
def test_sleeping_holds_requests_until_the_engine_wakes(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    async def main() -> None:
        kept = await start(engine, 0)
        await engine.sleep(level=1, mode="keep")
        assert await engine.is_sleeping()
        late = asyncio.ensure_future(consume(engine, 1))
        await asyncio.sleep(0.05)
        assert not late.done()
        assert await engine.wake_up()
        assert await late == expected[1]
        await engine.sleep(mode="abort")
        assert [output async for output in kept][-1].outputs[0].finish_reason == "abort"
        await engine.wake_up()
        waited = asyncio.ensure_future(consume(engine, 2))
        await until(lambda: bool(engine.engine.scheduler.running))
        await engine.sleep(mode="wait")
        assert await waited == expected[2]

    run(main())


@pytest.mark.usefixtures("slow")
def test_generation_can_be_paused_for_new_weights(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(consume(engine, 0))
        await until(lambda: bool(engine.engine.scheduler.running) or task.done())
        await engine.pause_generation(mode="keep")
        assert await engine.is_paused()
        [weights] = await engine.apply_model(lambda model: {"model.norm.weight": model.norm.weight.clone()})
        await engine.start_weight_update()
        await engine.update_weights(weights)
        await engine.finish_weight_update("2")
        assert await engine.get_weight_version() == "2"
        await engine.update_weight_version("3")
        assert await engine.get_weight_version() == "3"
        await engine.resume_generation()
        assert not await engine.is_paused()
        assert await task == expected[0]

    run(main())


def test_calls_run_between_steps(make: Make, tmp_path: Path) -> None:
    engine = make(disable_log_stats=False, profiler_config={"torch_profiler_dir": str(tmp_path)})

    async def main() -> None:
        await engine.start_profile("traced")
        task = asyncio.ensure_future(consume(engine, 0, greedy(60)))
        names = await engine.collective_rpc(lambda worker, a: (threading.current_thread().name, a), args=(1,))
        assert names == [("taco-engine", 1)]
        assert await engine.reset_prefix_cache() is True
        await engine.reset_mm_cache()
        await engine.do_log_stats()
        await engine.check_health()
        with pytest.raises(ZeroDivisionError):
            await engine.apply_model(lambda model: 1 // 0)
        await task
        await engine.stop_profile()
        [metric] = [metric for metric in await engine.get_metrics() if metric.name == "vllm:generation_tokens"]
        assert isinstance(metric, Counter) and metric.value == 60

    run(main())
    [path] = tmp_path.iterdir()
    assert path.name.startswith("traced_rank0")


def test_configs_and_tokenizer(make: Make) -> None:
    old, new = make(), make(compat_version="0.33")

    async def main() -> None:
        awaited: Awaitable[Any] = old.get_tokenizer()
        assert await awaited is old.tokenizer is old.engine.tokenizer.tokenizer
        assert new.get_tokenizer() is new.tokenizer
        assert await old.get_model_config() is old.model_config is old.vllm_config.model_config
        assert (await old.get_scheduler_config()).max_num_seqs == 4
        assert (await old.get_parallel_config()).world_size == 1
        assert await old.get_lora_config() is None and not await old.is_tracing_enabled()
        assert await old.get_supported_tasks() == ("generate",)

    run(main())


def test_configs_may_come_instead_of_arguments(tiny_llama_path: Path, expected: list[list[int]]) -> None:  # noqa: F811
    args = AsyncEngineArgs(str(tiny_llama_path), **SMALL)
    config = args.create_config()
    for engine in (
        AsyncLLMEngine.from_engine_args(args, config),
        AsyncLLMEngine.from_vllm_config(config, disable_log_stats=True),
    ):
        assert run(consume(engine, 0)) == expected[0]
        engine.shutdown()
    for wrong in ({"stat_loggers": [1]}, {"enable_log_requests": True}):
        with pytest.raises(UnsupportedFeatureError, match=next(iter(wrong))):
            AsyncLLMEngine.from_vllm_config(config, **wrong)


def test_construction_inside_a_running_loop(make: Make, expected: list[list[int]]) -> None:
    async def main() -> list[int]:
        engine = make()
        begin = time.time()
        outputs = engine.generate({"prompt_token_ids": PROMPTS[0]}, greedy(), "a")
        await asyncio.sleep(0.02)
        assert engine.get_num_unfinished_requests() == 0  # it begins when it is asked
        last = [output async for output in outputs][-1]
        assert last.metrics is not None and last.metrics.arrival_time >= begin
        return list(last.outputs[0].token_ids)

    assert run(main()) == expected[0]


# Names of vLLM


def test_an_engine_is_made_as_vllm_makes_it(tiny_llama_path: Path, expected: list[list[int]]) -> None:  # noqa: F811
    config = AsyncEngineArgs(str(tiny_llama_path), **SMALL, disable_log_stats=True).create_config()
    engine = AsyncLLMEngine(config, InProcessExecutor.get_class(config), log_stats=True, use_cached_outputs=False)
    assert run(consume(engine, 0)) == expected[0]
    assert run(engine.get_metrics())
    engine.shutdown()
    wrong: tuple[dict[str, Any], ...] = (
        {"stat_loggers": [1]},
        {"mm_registry": object()},
        {"input_registry": object()},
        {"client_addresses": {"a": "b"}},
        {"client_count": 2},
        {"client_index": 1},
        {"profiler": object()},
    )
    for options in wrong:
        with pytest.raises(UnsupportedFeatureError, match=next(iter(options))):
            AsyncLLMEngine(config, InProcessExecutor, log_stats=False, **options)
    with pytest.raises(UnsupportedFeatureError, match="client_count"):
        AsyncLLMEngine.from_vllm_config(config, client_count=2)


def test_tokens_that_wait_are_counted(engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.get_num_queued_tokens() == 0
    with monkeypatch.context() as patch:
        patch.setattr(GrammarGate, "num_tokens", 7)
        assert engine.get_num_queued_tokens() == 7

    async def main() -> None:
        await engine.pause_generation()
        tasks = [asyncio.ensure_future(consume(engine, number)) for number in (0, 3)]
        await until(lambda: engine.get_num_unfinished_requests() == 2)
        assert engine.get_num_queued_tokens() == len(PROMPTS[0]) + len(PROMPTS[3])
        await engine.resume_generation()
        await asyncio.gather(*tasks)
        assert engine.get_num_queued_tokens() == 0

    run(main())
    engine.check_admission(3, request_id="a")
    engine.shutdown()
    with pytest.raises(EngineDeadError):
        engine.check_admission()


def test_steps_can_be_run_by_hand(engine: AsyncLLMEngine, expected: list[list[int]]) -> None:
    async def main() -> None:
        assert await engine.engine_step(0) is False
        task = asyncio.ensure_future(consume(engine, 2))
        while not await engine.engine_step(virtual_engine=0):
            await asyncio.sleep(0)
        assert await task == expected[2]

    run(main())


def test_outputs_can_be_handed_to_consumers(engine: AsyncLLMEngine) -> None:
    async def main() -> None:
        await engine.pause_generation()
        task = asyncio.ensure_future(consume(engine, 1))
        await until(lambda: engine.get_num_unfinished_requests() == 1)
        mine = [RequestOutput.new("request 1", None, [1], "", [1, 2], finished) for finished in (False, True)]
        assert engine.process_request_outputs(mine[:1]) is False
        assert engine.process_request_outputs(mine[1:]) is True
        assert await task == [1, 2]

    run(main())


def test_an_engine_can_be_declared_dead(engine: AsyncLLMEngine) -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(engine.run_engine_loop(weakref.ref(engine)))
        iterator = await start(engine, 0)
        assert not waiting.done()
        engine.set_errored(ValueError("by hand"))
        with pytest.raises(EngineDeadError, match="by hand"):
            while True:
                await anext(iterator)
        await waiting
        assert engine.errored and not engine.is_running
        with pytest.raises(EngineDeadError, match="by hand"):
            await engine.check_health()

    run(main())


def test_checksums_tell_weights_apart(make: Make) -> None:
    engine, same = make(), make()

    async def main() -> None:
        [before] = await engine.compute_weight_checksums()
        assert [before] == await same.compute_weight_checksums()
        [weight] = await engine.apply_model(lambda model: model.norm.weight.clone())
        await engine.update_weights({"model.norm.weight": weight + 1})
        [after] = await engine.compute_weight_checksums()
        changed = [name for name, digest in after.items() if before[name] != digest]
        assert len(changed) == 1 and "norm" in changed[0] and before.keys() == after.keys()

    run(main())


def test_what_an_engine_does_not_have_is_refused_by_name(engine: AsyncLLMEngine) -> None:
    async def main() -> None:
        assert await engine.list_loras() == set() and await engine.remove_lora(1) is False
        assert await engine.get_external_elastic_ep_status() is None
        assert await engine.get_input_preprocessor() is engine.engine.input_processor
        assert (await engine.get_decoding_config()).guided_decoding_backend == "auto"
        for coroutine, what in (
            (engine.add_lora(object()), "LoRA"),
            (engine.pin_lora(1), "LoRA"),
            (engine.checkpoint_prepare(), "cannot be saved"),
            (engine.scale_elastic_ep(2), "one device"),
            (engine.init_weight_transfer_engine(object()), "another process"),
        ):
            with pytest.raises(UnsupportedFeatureError, match=what):
                await coroutine

    run(main())
    with pytest.raises(UnsupportedFeatureError, match="get_metrics"):
        engine.add_logger("name", object())
    assert engine.get_kv_event_sources() == {} and engine.should_keep_api_server_alive is False
