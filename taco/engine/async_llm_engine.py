"""`AsyncLLMEngine`: an engine for programs that run in an event loop of asyncio.

One thread owns an `LLMEngine` and does everything with it: it adds requests, runs steps and hands outputs to the event
loops of their consumers. There is no other process, and no event loop of its own.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from taco.engine.arg_utils import EngineArgs
from taco.engine.llm_engine import LLMEngine
from taco.errors import EngineDeadError, EngineError, refuse_given, refused
from taco.executor.inprocess import InProcessExecutor
from taco.models.loader.source import headers_kept
from taco.request import RequestStatus
from taco.sampling_params import RequestOutputKind
from taco.usage_context import UsageContext

if TYPE_CHECKING:
    from taco.config import TacoConfig
    from taco.engine.metrics import Metric
    from taco.outputs import PoolingRequestOutput, RequestOutput
    from taco.pooling_params import PoolingParams
    from taco.sampling_params import SamplingParams

_DRAIN_INTERVAL_S = 0.02


class _Stream:
    """What one request produces, on its way to the coroutine that consumes it."""

    def __init__(self, request_id: str, params: SamplingParams | PoolingParams | None) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        # An output that holds all tokens so far makes the ones before it superfluous.
        self._replaces = getattr(params, "output_kind", None) is not RequestOutputKind.DELTA
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, item: Any) -> None:
        """Called in the event loop: an output, an exception to raise, or None at the end."""
        if self._replaces and not self._items.empty() and item is not None and not isinstance(item, BaseException):
            self._items.get_nowait()
        self._items.put_nowait(item)

    async def get(self) -> Any:
        return await self._items.get()


def _put_all(pairs: Iterable[tuple[_Stream, Any]]) -> None:
    for stream, item in pairs:
        stream.put(item)


class _EngineThread:
    """The thread that owns an engine. It starts with the first call, and ends with `stop`."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.error: BaseException | None = None  # why it has ended, if not by `stop`
        self.is_stopped = False
        self._streams: dict[str, _Stream] = {}
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of what other threads write: `_thread` and `is_stopped`

    # From any thread

    def post(self, call: Callable[[], object]) -> None:
        """Has the thread make a call, after those posted before and before the next step.

        Raises:
            EngineDeadError: the thread has ended.
        """
        with self._lock:
            if self.is_stopped:
                raise self.dead_error()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="taco-engine", daemon=True)
                self._thread.start()
            self._calls.put(call)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """As `post`, with the result or the exception of the call."""
        future: Future[Any] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(call)
        return future

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after the step that runs, and closes the engine; consumers get an EngineDeadError."""
        with self._lock:
            was_stopped, self.is_stopped = self.is_stopped, True
        thread = self._thread
        if thread is None:
            self.engine.close()
            return
        if not was_stopped:
            self._calls.put(None)
        if thread is not threading.current_thread():
            thread.join(timeout)

    def dead_error(self) -> EngineDeadError:
        """A new error that says why nothing can be asked of the engine any more."""
        if self.error is None:
            return EngineDeadError("The engine was shut down; create a new one.")
        error = EngineDeadError(f"The engine has failed: {type(self.error).__name__}: {self.error}")
        error.__cause__ = self.error
        return error

    # In the thread

    def add(self, stream: _Stream, prompt: Any, params: Any, options: Mapping[str, Any]) -> None:
        """Adds a request; an error goes to its consumer."""
        try:
            self.engine.add_request(stream.request_id, prompt, params, **options)
        except Exception as error:
            self._hand_out([(stream, error)])
        else:
            self._streams[stream.request_id] = stream

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests; their consumers get what there is of the outputs, and the end."""
        streams = [self._streams.pop(one) for one in request_ids if one in self._streams]
        outputs = {output.request_id: output for output in self.engine.abort([one.request_id for one in streams])}
        self._hand_out([(stream, outputs.get(stream.request_id)) for stream in streams])

    def leave(self, stream: _Stream) -> None:
        """The consumer has left: its request ends, if it has not yet."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self.engine.abort_request(stream.request_id)

    def _run(self) -> None:
        try:
            while self._make_calls():
                self.step()
        except BaseException as error:
            self.error = error
        finally:
            with self._lock:
                self.is_stopped = True
            try:
                self.engine.close()
            finally:
                self._fail(self.dead_error)
                # Calls that came too late fail; nobody must wait for them for ever.
                while not self._calls.empty():
                    if (call := self._calls.get()) is not None:
                        call()

    def _can_step(self) -> bool:
        return self.engine.has_unfinished_requests() and self.engine.why_idle() is None

    def _make_calls(self) -> bool:
        """Makes the calls that were posted; waits for one if there is nothing else to do. False at the end."""
        while not self._calls.empty() or not self._can_step():
            call = self._calls.get()
            if call is None:
                return False
            call()
            self.distribute(self.engine.take_late_outputs())
        return True

    def step(self) -> None:
        """Runs a step if there is one to run, and hands its outputs to their consumers."""
        if not self._can_step():
            return
        try:
            outputs = self.engine.step()
        except Exception as error:
            self._fail(partial(_step_error, error))
            if self.engine.model_executor is None:
                raise  # the engine could not be repaired, and has closed itself
        else:
            self.distribute(outputs)

    def distribute(self, outputs: Iterable[Any]) -> None:
        """Hands outputs to the consumers of their requests."""
        pairs = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # its consumer has left
            if output.finished:
                del self._streams[output.request_id]
            pairs.append((stream, output))
        self._hand_out(pairs)

    def _fail(self, make_error: Callable[[], Exception]) -> None:
        """All requests are gone; each consumer gets an exception of its own."""
        streams, self._streams = self._streams, {}
        self._hand_out([(stream, make_error()) for stream in streams.values()])

    def _hand_out(self, pairs: Iterable[tuple[_Stream, Any]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Any]]] = defaultdict(list)
        for stream, item in pairs:
            by_loop[stream.loop].append((stream, item))
        for loop, group in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, group)
            except RuntimeError:  # the event loop was closed, and nobody is there any more
                for stream, _ in group:
                    self.leave(stream)


def _step_error(error: Exception) -> EngineError:
    result = EngineError(f"A step of the engine failed, and all requests were aborted: {type(error).__name__}: {error}")
    result.__cause__ = error
    return result


async def _as_awaitable(value: Any) -> Any:
    return value


class AsyncLLMEngine:
    """Runs requests for coroutines: each consumes the outputs of its request as an asynchronous iterator.

    Requests of all coroutines share the steps of one engine, which a thread of this process runs. The engine works in
    any event loop, in several at once, and in one after the other. `shutdown`, `del` and the end of the program end it.

    If a step fails, every request under way raises an EngineError, and the engine goes on with the next ones.

    `from_engine_args` is the usual way to make one.

    Args:
        vllm_config, executor_class, log_stats, usage_context, mm_registry, stat_loggers, aggregate_engine_logging: as
            of `LLMEngine`.
        log_requests: without effect: requests are never logged.
        start_engine_loop: without effect: the thread starts with the first request.
        client_addresses, profiler: must be None.
        client_count, client_index: must be 1 and 0: nobody else uses the engine.
        kwargs: further arguments of `LLMEngine`.
    """

    def __init__(
        self,
        vllm_config: TacoConfig,
        executor_class: type[InProcessExecutor],
        log_stats: bool,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        mm_registry: None = None,
        log_requests: bool = True,
        start_engine_loop: bool = True,
        stat_loggers: object = None,
        aggregate_engine_logging: bool = False,
        client_addresses: Mapping[str, str] | None = None,
        client_count: int = 1,
        client_index: int = 0,
        profiler: None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_clients(client_addresses, client_count, client_index)
        refuse_given(profiler=profiler)
        engine = LLMEngine(
            vllm_config,
            executor_class,
            log_stats,
            usage_context,
            stat_loggers,
            mm_registry=mm_registry,
            aggregate_engine_logging=aggregate_engine_logging,
            **kwargs,
        )
        self._thread = _EngineThread(engine)
        self._finalizer = weakref.finalize(self, self._thread.stop)

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        engine_config: TacoConfig | None = None,
        start_engine_loop: bool = True,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: object = None,
    ) -> AsyncLLMEngine:
        """Creates an engine from flat arguments. It blocks while the model is loaded.

        Args:
            engine_args: `AsyncEngineArgs` or `EngineArgs`.
            engine_config: what `engine_args.create_config()` has made, if it was called already.
            start_engine_loop, usage_context: without effect.
            stat_loggers: must be None; `get_metrics` has what they would be told.
        """
        with headers_kept():
            return cls.from_vllm_config(engine_config or engine_args.create_config(), stat_loggers=stat_loggers)

    @classmethod
    def from_vllm_config(
        cls,
        vllm_config: TacoConfig,
        start_engine_loop: bool = True,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: object = None,
        enable_log_requests: bool = False,
        aggregate_engine_logging: bool = False,
        disable_log_stats: bool = False,
        client_addresses: Mapping[str, str] | None = None,
        client_count: int = 1,
        client_index: int = 0,
    ) -> AsyncLLMEngine:
        """Creates an engine from its config.

        Args:
            start_engine_loop, usage_context, aggregate_engine_logging: without effect.
            stat_loggers: must be None.
            enable_log_requests: must not be True.
            disable_log_stats: count no metrics, although the config says so.
            client_addresses, client_count, client_index: must be None, 1 and 0: nobody else uses the engine.
        """
        refuse_given(enable_log_requests=enable_log_requests or None)
        log_stats = vllm_config.log_stats_interval_s is not None and not disable_log_stats
        return cls(
            vllm_config,
            InProcessExecutor,
            log_stats,
            usage_context,
            stat_loggers=stat_loggers,
            client_addresses=client_addresses,
            client_count=client_count,
            client_index=client_index,
        )

    # Requests

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        lora_request: object = None,
        trace_headers: Mapping[str, str] | None = None,
        prompt_adapter_request: object = None,
        priority: int = 0,
        *,
        prompt_text: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: object = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generates completions for a prompt, and yields them as they grow.

        The request begins when the iterator is first asked, and ends when the coroutine leaves the iterator or is
        cancelled: its KV cache is freed then. A coroutine that is slower than the engine does not see every state in
        between; with `output_kind=RequestOutputKind.DELTA` it gets every token all the same.

        Args:
            prompt: text, token ids or a prompt dictionary.
            sampling_params: its `output_kind` decides what is yielded.
            request_id: not that of another request under way.
            lora_request, trace_headers, prompt_adapter_request: must be None.
            priority: smaller runs earlier under scheduling_policy="priority".
            tokenization_kwargs: see `LLM.generate`.
            prompt_text, data_parallel_rank, session_id, kv_hints, reasoning_ended, reasoning_parser_kwargs: see
                `LLMEngine.add_request`.

        Raises:
            TacoValidationError: the request is not valid; others are not affected.
            EngineError: a step failed.
            EngineDeadError: the engine was shut down.
        """
        options = {
            "lora_request": lora_request,
            "trace_headers": trace_headers,
            "prompt_adapter_request": prompt_adapter_request,
            "priority": priority,
            "prompt_text": prompt_text,
            "tokenization_kwargs": tokenization_kwargs,
            "data_parallel_rank": data_parallel_rank,
            "session_id": session_id,
            "kv_hints": kv_hints,
            "reasoning_ended": reasoning_ended,
            "reasoning_parser_kwargs": reasoning_parser_kwargs,
        }
        return self._outputs(request_id, prompt, sampling_params, options)

    def encode(
        self,
        prompt: Any,
        pooling_params: PoolingParams,
        request_id: str,
        lora_request: object = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        reasoning_ended: bool | None = None,
    ) -> AsyncGenerator[PoolingRequestOutput[Any], None]:
        """Pools the hidden states of a prompt, and yields the one result; arguments and errors as for `generate`."""
        options = {
            "lora_request": lora_request,
            "trace_headers": trace_headers,
            "priority": priority,
            "tokenization_kwargs": tokenization_kwargs,
            "reasoning_ended": reasoning_ended,
        }
        return self._outputs(request_id, prompt, pooling_params, options)

    async def add_request(
        self,
        request_id: str,
        prompt: Any = None,
        params: SamplingParams | PoolingParams | None = None,
        arrival_time: float | None = None,
        lora_request: object = None,
        trace_headers: Mapping[str, str] | None = None,
        prompt_adapter_request: object = None,
        priority: int = 0,
        *,
        inputs: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        prompt_text: str | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: Mapping[str, Any] | None = None,
        kv_hints: object = None,
    ) -> AsyncGenerator[Any, None]:
        """The iterator of `generate` or `encode`; arguments as for `LLMEngine.add_request`.

        Args:
            arrival_time: seconds since the epoch; when the request begins if None.
        """
        options = {
            "arrival_time": arrival_time,
            "lora_request": lora_request,
            "trace_headers": trace_headers,
            "prompt_adapter_request": prompt_adapter_request,
            "priority": priority,
            "inputs": inputs,
            "tokenization_kwargs": tokenization_kwargs,
            "data_parallel_rank": data_parallel_rank,
            "session_id": session_id,
            "prompt_text": prompt_text,
            "reasoning_ended": reasoning_ended,
            "reasoning_parser_kwargs": reasoning_parser_kwargs,
            "kv_hints": kv_hints,
        }
        return self._outputs(request_id, prompt, params, options)

    async def _outputs(
        self, request_id: str, prompt: Any, params: SamplingParams | PoolingParams | None, options: Mapping[str, Any]
    ) -> AsyncGenerator[Any, None]:
        stream = _Stream(request_id, params)
        thread = self._thread
        thread.post(partial(thread.add, stream, prompt, params, options))
        is_over = False
        try:
            while not is_over:
                item = await stream.get()
                is_over = item is None or isinstance(item, BaseException) or item.finished
                if isinstance(item, BaseException):
                    raise item
                if item is not None:
                    yield item
        finally:
            if not is_over and not thread.is_stopped:
                thread.post(partial(thread.leave, stream))

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Ends requests; the last output of each has the finish_reason "abort". Unknown ids are left alone.

        Args:
            internal: without effect: requests have one id, the caller's.
        """
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        await self._call(lambda engine: self._thread.abort(request_ids))

    def get_num_unfinished_requests(self) -> int:
        """Requests whose last output has not been handed to their consumer."""
        return self._thread.engine.get_num_unfinished_requests()

    async def wait_for_requests_to_drain(self, drain_timeout: float = 300) -> None:
        """Waits until no request is under way.

        Args:
            drain_timeout: longest wait, in seconds.

        Raises:
            TimeoutError: requests are still under way.
        """
        end = time.monotonic() + drain_timeout
        while num_unfinished := self.get_num_unfinished_requests():
            if time.monotonic() >= end:
                raise TimeoutError(f"{num_unfinished} requests are still under way after {drain_timeout} s.")
            await asyncio.sleep(_DRAIN_INTERVAL_S)

    def get_num_queued_tokens(self) -> int:
        """Tokens of requests that wait to be run, among them preempted ones and those that wait for their grammars."""
        engine = self._thread.engine
        requests = list(engine.scheduler.requests.values())
        queued = sum(request.num_tokens for request in requests if request.status is not RequestStatus.RUNNING)
        return queued + engine.grammar_gate.num_tokens

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Raises EngineDeadError if the engine has ended; else any number of requests may come, and wait."""
        if self._thread.is_stopped:
            raise self._thread.dead_error()

    # State

    @property
    def engine(self) -> LLMEngine:
        """The engine; read it, but leave running it to its thread."""
        return self._thread.engine

    @property
    def vllm_config(self) -> TacoConfig:
        return self._thread.engine.config

    @property
    def model_config(self) -> Any:
        return self._thread.engine.model_config

    @property
    def tokenizer(self) -> Any:
        return self._thread.engine.input_processor.tokenizer

    @property
    def is_running(self) -> bool:
        """Whether requests can be made."""
        return not self._thread.is_stopped

    @property
    def is_stopped(self) -> bool:
        return self._thread.is_stopped

    @property
    def errored(self) -> bool:
        """Whether the engine has failed for good."""
        return self._thread.error is not None

    @property
    def dead_error(self) -> BaseException:
        """What calls raise once the engine has ended."""
        return self._thread.dead_error()

    @property
    def should_keep_api_server_alive(self) -> bool:
        """False: there is no server."""
        return False

    def get_tokenizer(self, lora_request: object = None) -> Any:
        """The tokenizer, whatever the adapter; in vLLM 0.6, whose behaviour is the default, it has to be awaited."""
        engine = self._thread.engine
        tokenizer = engine.get_tokenizer()
        return _as_awaitable(tokenizer) if engine.config.behaviour.tokenizer_is_awaited else tokenizer

    async def get_model_config(self) -> Any:
        return self._thread.engine.model_config

    async def get_parallel_config(self) -> Any:
        return self._thread.engine.parallel_config

    async def get_scheduler_config(self) -> Any:
        return self._thread.engine.scheduler_config

    async def get_decoding_config(self) -> Any:
        return self._thread.engine.get_decoding_config()

    async def get_lora_config(self) -> None:
        """None."""

    async def get_input_preprocessor(self) -> Any:
        """What makes requests of prompts."""
        return self._thread.engine.input_processor

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """What the model can do: ("generate",), or pooling tasks."""
        return self._thread.engine.get_supported_tasks()

    async def is_tracing_enabled(self) -> bool:
        """False."""
        return False

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine has ended."""
        if self._thread.is_stopped:
            raise self._thread.dead_error()

    def shutdown(self, timeout: float | None = None) -> None:
        """Ends the engine after the step that runs, and gives all memory back. Requests raise EngineDeadError.

        Args:
            timeout: seconds to wait for the step; None for as long as it takes.
        """
        self._thread.stop(timeout)

    def start_background_loop(self) -> None:
        """Does nothing: the thread starts with the first request."""

    shutdown_background_loop = shutdown

    def set_errored(self, exc: Exception) -> None:
        """Ends the engine as failed: requests under way, and what comes later, raise an EngineDeadError that names it.

        Args:
            exc: why.
        """
        self._thread.error = exc
        self._thread.stop()

    @staticmethod
    async def run_engine_loop(engine_ref: Callable[[], AsyncLLMEngine | None]) -> None:
        """Waits for the end of an engine, whose thread runs the steps by itself.

        Args:
            engine_ref: a weak reference to it.
        """
        while (engine := engine_ref()) is not None and engine.is_running:
            del engine
            await asyncio.sleep(_DRAIN_INTERVAL_S)

    async def engine_step(self, virtual_engine: int) -> bool:
        """Has the thread run a step at once; it runs all steps anyway.

        Args:
            virtual_engine: without effect: there is one engine.

        Returns:
            Whether requests are under way.
        """

        def step(engine: LLMEngine) -> bool:
            self._thread.step()
            return engine.has_unfinished_requests()

        return bool(await self._call(step))

    def process_request_outputs(self, request_outputs: Sequence[Any]) -> bool:
        """Hands outputs to the consumers of their requests, as the thread does with those of every step.

        Returns:
            Whether all of them are the last of their requests.
        """
        self._thread.post(partial(self._thread.distribute, request_outputs))
        return all(output.finished for output in request_outputs)

    # Between steps: see `LLM`, whose methods these are

    async def _call(self, function: Callable[[LLMEngine], Any]) -> Any:
        """Has the thread call a function with the engine, between two steps."""
        return await asyncio.wrap_future(self._thread.call(partial(function, self._thread.engine)))

    async def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """See `LLM.collective_rpc`."""
        results: list[Any] = await self._call(lambda engine: engine.collective_rpc(method, timeout, args, kwargs))
        return results

    async def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """See `LLM.apply_model`."""
        results: list[Any] = await self._call(lambda engine: engine.apply_model(func))
        return results

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """See `LLM.sleep`. Requests that are made meanwhile wait."""
        await self._call(lambda engine: engine.sleep(level, mode))

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """See `LLM.wake_up`."""
        return bool(await self._call(lambda engine: engine.wake_up(tags)))

    async def is_sleeping(self) -> bool:
        """Whether `sleep` was called, and not everything has been woken up since."""
        return bool(await self._call(lambda engine: engine.is_sleeping()))

    async def release_kv_cache_memory(self) -> None:
        """See `LLM.release_kv_cache_memory`."""
        await self._call(lambda engine: engine.release_kv_cache_memory())

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """Lets no step run until `resume_generation`. Requests that are made meanwhile wait.

        Args:
            mode: what becomes of requests under way, see `LLM.sleep`.
            clear_cache: forget cached prefixes; requests that are kept are computed anew.
        """

        def pause(engine: LLMEngine) -> None:
            engine.sleep(0, mode)
            if clear_cache:
                engine.reset_prefix_cache(reset_running_requests=True)

        await self._call(pause)

    async def resume_generation(self) -> None:
        """Ends `pause_generation`."""
        await self._call(lambda engine: engine.wake_up(["scheduling"]))

    is_paused = is_sleeping

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """See `LLM.reset_prefix_cache`."""
        return bool(await self._call(lambda engine: engine.reset_prefix_cache(reset_running_requests, reset_connector)))

    async def reset_mm_cache(self) -> None:
        """Does nothing: no images, audio or video are cached."""

    reset_encoder_cache = reset_mm_cache

    async def start_profile(
        self,
        profile_prefix: str | None = None,
        *,
        delay_iterations: int | None = None,
        max_iterations: int | None = None,
        profiler_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """See `LLM.start_profile`."""
        options = {
            "delay_iterations": delay_iterations,
            "max_iterations": max_iterations,
            "profiler_kwargs": profiler_kwargs,
        }
        await self._call(lambda engine: engine.collective_rpc("start_profile", args=(profile_prefix,), kwargs=options))

    async def stop_profile(self) -> None:
        """See `LLM.stop_profile`."""
        await self._call(lambda engine: engine.stop_profile())

    async def get_metrics(self) -> list[Metric]:
        """See `LLM.get_metrics`."""
        metrics: list[Metric] = await self._call(lambda engine: engine.get_metrics())
        return metrics

    async def do_log_stats(self, scheduler_outputs: object = None, model_output: object = None) -> None:
        """Writes a line about the engine to the log, if metrics are counted; the arguments have no effect."""
        await self._call(lambda engine: engine.do_log_stats())

    async def start_weight_update(self) -> None:
        """See `LLM.start_weight_update`. Requests under way wait, and go on with the new weights."""
        await self._call(lambda engine: engine.start_weight_update())

    async def update_weights(self, request: Any) -> None:
        """See `LLM.update_weights`."""
        await self._call(lambda engine: engine.update_weights(request))

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See `LLM.finish_weight_update`."""
        await self._call(lambda engine: engine.finish_weight_update(weight_version))

    async def get_weight_version(self) -> str:
        """The name of the weights; "default" until it is set."""
        return str(await self._call(lambda engine: engine.get_weight_version()))

    async def update_weight_version(self, new_version: str) -> None:
        """Names the weights."""
        await self._call(lambda engine: engine.set_weight_version(new_version))

    async def compute_weight_checksums(self) -> list[dict[str, str]]:
        """What tells weights apart: for each worker, of which there is one, SHA-256 digests by name.

        The names and the contents are those of the parameters in memory, which are merged and packed: compare engines
        of one version of taco on the same kind of machine.
        """
        checksums: list[dict[str, str]] = await self.collective_rpc("compute_weight_checksums")
        return checksums

    async def list_loras(self) -> set[int]:
        """See `LLMEngine.list_loras`."""
        return self._thread.engine.list_loras()

    async def add_lora(self, lora_request: object) -> None:
        """See `LLMEngine.add_lora`."""
        self._thread.engine.add_lora(lora_request)

    async def remove_lora(self, lora_id: int) -> bool:
        """See `LLMEngine.remove_lora`."""
        return self._thread.engine.remove_lora(lora_id)

    async def pin_lora(self, lora_id: int) -> None:
        """See `LLMEngine.pin_lora`."""
        self._thread.engine.pin_lora(lora_id)

    # What there is none of

    add_logger = LLMEngine.add_logger
    remove_logger = LLMEngine.remove_logger

    @refused
    async def init_weight_transfer_engine(self, request: object) -> None:
        """Weights from another process are not supported; give update_weights() tensors of this process."""

    async def shutdown_weight_transfer_engine(self) -> None:
        """Does nothing: there is none."""

    @refused
    async def start_draft_weight_update(self) -> None:
        """Speculative decoding is not supported, so there is no draft model."""

    @refused
    async def checkpoint_prepare(self) -> None:
        """A running engine cannot be saved; let its requests end, and make a new one later."""

    @refused
    async def checkpoint_restore(self) -> None:
        """A running engine cannot be saved, so there is none to restore; make a new one."""

    @refused
    async def scale_elastic_ep(self, new_data_parallel_size: int, drain_timeout: int = 300) -> None:
        """An engine runs on one device; start several processes, each with a part of the prompts."""

    async def get_external_elastic_ep_status(self) -> None:
        """None: the number of devices does not change."""

    @refused
    async def handle_fault(self, fault_tolerance_request: object) -> None:
        """Fault tolerance between engines is not supported: where a step fails, its requests raise an EngineError."""

    @refused
    async def get_status(self) -> None:
        """Fault tolerance between engines is not supported; see is_running, errored and dead_error."""

    @refused
    async def notify_kv_transfer_request_rejected(
        self, request_id: str, kv_transfer_params: dict[str, Any], *, data_parallel_rank: int | None = None
    ) -> None:
        """Sending a KV cache to other engines is not supported, so there is nothing to reject."""

    def get_kv_event_sources(self) -> dict[int, Any]:
        """The empty dict: events of the KV cache are not published."""
        return {}


def _refuse_clients(addresses: object, count: int, index: int) -> None:
    refuse_given(
        client_addresses=addresses,
        client_count=None if count == 1 else count,
        client_index=None if index == 0 else index,
    )


AsyncLLM = AsyncLLMEngine  # vLLM's newer name
