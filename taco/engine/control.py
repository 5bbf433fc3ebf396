"""What programs do to an engine between steps: calls on the worker, sleep, profiling, new weights, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from taco.errors import (
    EngineAsleepError,
    EngineDeadError,
    StatsDisabledError,
    TacoValidationError,
    UnsupportedFeatureError,
    refused,
)

if TYPE_CHECKING:
    from taco.config import TacoConfig
    from taco.engine.metrics import EngineMetrics, Metric
    from taco.engine.scheduler import Scheduler
    from taco.executor.inprocess import InProcessExecutor

T = TypeVar("T")

SLEEP_MODES = ("abort", "wait", "keep")
TAGS = ("weights", "kv_cache", "scheduling")


class EngineControl:
    """The part of `LLMEngine` that is not about requests. Its methods may be called while requests are unfinished."""

    DO_VALIDATE_OUTPUT: ClassVar[bool] = False

    config: TacoConfig
    scheduler: Scheduler
    _executor: InProcessExecutor | None
    _metrics: EngineMetrics | None

    def __init__(self, executor: InProcessExecutor) -> None:
        self._executor = executor
        self._cache_epoch = executor.cache_epoch
        self._is_paused = False
        self._is_updating = False
        self._weight_version = "default"

    if TYPE_CHECKING:  # of `LLMEngine`

        def _finish_steps(self) -> None:
            """Waits for the steps in flight; their outputs come with the next `step`."""

        def _finish_requests(self) -> None:
            """Runs all requests to their end; their outputs come with the next `step`."""

        def _abort_requests(self) -> None:
            """Aborts all requests; their outputs come with the next `step`."""

    def _alive(self) -> InProcessExecutor:
        if self._executor is None:
            raise EngineDeadError("The engine is closed; create a new LLM.")
        return self._executor

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine was closed."""
        self._alive()

    # Whether steps can run

    def why_idle(self) -> str | None:
        """Why no step can run, and what to do about it; None if one can."""
        executor = self._alive()
        if executor.asleep:
            return f"The engine is asleep ({', '.join(sorted(executor.asleep))}); call wake_up() first."
        if self._is_paused:
            return 'The engine is paused by sleep(level=0); call wake_up(tags=["scheduling"]) first.'
        if self._is_updating:
            return "A weight update is under way; call finish_weight_update() first."
        if missing := executor.missing_weights:
            return (
                f"{len(missing)} tensors are missing since sleep(level=2) dropped the weights, such as {min(missing)}; "
                'load them with update_weights(), or all those of the checkpoint with collective_rpc("reload_weights").'
            )
        return None

    def _check_ready(self) -> None:
        """Before a step: raises EngineAsleepError if none can run; what the KV cache lost is forgotten here too."""
        reason = self.why_idle()
        if reason is not None:
            raise EngineAsleepError(reason)
        if self._cache_epoch != self._alive().cache_epoch:
            self._forget_kv_cache()

    def _forget_kv_cache(self) -> None:
        self._finish_steps()
        self.scheduler.forget_kv_cache()
        self._cache_epoch = self._alive().cache_epoch

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forgets every cached prefix.

        Args:
            reset_running_requests: requests that run are computed anew; otherwise they keep what they have computed.
            reset_connector: without effect, as the cache is in this process alone.

        Returns:
            True.
        """
        self._alive()
        if reset_running_requests:
            self._forget_kv_cache()
        self.scheduler.blocks.pool.reset_index()
        return True

    def reset_mm_cache(self) -> None:
        """Does nothing: no images, audio or video are cached."""

    reset_encoder_cache = reset_mm_cache

    # Calls on the worker

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """See `LLM.collective_rpc`."""
        executor = self._alive()
        self._finish_steps()
        return executor.collective_rpc(method, timeout, args, kwargs)

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """See `LLM.apply_model`."""
        return self.collective_rpc(lambda worker: func(worker.get_model()))

    # Sleeping

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """See `LLM.sleep`."""
        self._alive()
        if level not in (0, 1, 2):
            raise TacoValidationError(f"level must be 0, 1 or 2, got {level!r}.", parameter="level", value=level)
        if mode not in SLEEP_MODES:
            raise TacoValidationError(f"mode must be one of {SLEEP_MODES}, got {mode!r}.", parameter="mode", value=mode)
        if mode == "abort":
            self._abort_requests()
        elif mode == "wait" and self.why_idle() is None:
            self._finish_requests()
        if level:
            self.collective_rpc("sleep", args=(level,))
        self._is_paused = True

    def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        """See `LLM.wake_up`."""
        self._alive()
        if tags is not None and (unknown := set(tags) - set(TAGS)):
            raise TacoValidationError(
                f"tags can be {', '.join(TAGS)}, got {sorted(unknown)}.", parameter="tags", value=tags
            )
        memory = None if tags is None else [tag for tag in tags if tag != "scheduling"]
        self.collective_rpc("wake_up", args=(memory,))
        self._is_paused = bool(self._alive().asleep)
        return not self._is_paused

    def is_sleeping(self) -> bool:
        """Whether `sleep` was called, and not everything has been woken up since."""
        return self._is_paused or bool(self._alive().asleep)

    def release_kv_cache_memory(self) -> None:
        """See `LLM.release_kv_cache_memory`."""
        if not self._is_paused or self._alive().asleep:
            raise TacoValidationError(
                "The KV cache is released while the engine is paused and has all its memory: call sleep(level=0) first."
            )
        self.collective_rpc("free_kv_cache")

    # Profiling

    def start_profile(
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
        self.collective_rpc("start_profile", args=(profile_prefix,), kwargs=options)

    def stop_profile(self) -> None:
        """See `LLM.stop_profile`."""
        self.collective_rpc("stop_profile")

    # Weights

    def start_weight_update(self) -> None:
        """See `LLM.start_weight_update`."""
        self._alive()
        self._finish_steps()
        self._is_updating = True

    def update_weights(self, request: Any) -> set[str]:
        """See `LLM.update_weights`."""
        if hasattr(request, "update_info") or (isinstance(request, Mapping) and "update_info" in request):
            raise UnsupportedFeatureError(
                "Weights from another process are not supported; pass the tensors themselves, as a mapping from names "
                "to tensors or as pairs of both.",
                parameter="request",
            )
        names: set[str] = self.collective_rpc("load_weights", args=(request,))[0]
        return names

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See `LLM.finish_weight_update`."""
        if not self._is_updating:
            raise TacoValidationError("There is no weight update to finish; call start_weight_update() first.")
        if missing := self._alive().missing_weights:
            raise TacoValidationError(
                f"The weight update lacks {len(missing)} tensors, such as {min(missing)}; load them first."
            )
        self._is_updating = False
        if weight_version is not None:
            self._weight_version = weight_version

    def get_weight_version(self) -> str:
        """The name of the weights; "default" until it is set."""
        return self._weight_version

    def set_weight_version(self, weight_version: str) -> None:
        """Names the weights."""
        self._weight_version = weight_version

    # Metrics

    def get_metrics(self) -> list[Metric]:
        """See `LLM.get_metrics`."""
        if self._metrics is None:
            raise StatsDisabledError("Stat logging disabled: pass disable_log_stats=False when the engine is made.")
        return self._metrics.snapshot(self.scheduler)

    def do_log_stats(
        self,
        scheduler_outputs: object = None,
        model_output: object = None,
        finished_before: object = None,
        skip: object = None,
    ) -> None:
        """Writes a line about the engine to the log, if metrics are counted.

        The arguments of vLLM 0.6 have no effect: the engine knows what it has done.
        """
        if self._metrics is not None:
            self._metrics.log(self.scheduler)

    def do_log_stats_with_interval(self) -> None:
        """`do_log_stats`, unless the last line is less than `log_stats_interval_s` old."""
        if self._metrics is not None:
            self._metrics.log_if_due(self.scheduler)

    @refused
    def add_logger(self, logger_name: str, logger: object) -> None:
        """Loggers of statistics are not supported; call get_metrics() when you need them."""

    @refused
    def remove_logger(self, logger_name: str) -> None:
        """Loggers of statistics are not supported, so there is none to remove."""

    # Checks of outputs, which vLLM's own front ends switch on while they are tested

    @classmethod
    @contextmanager
    def enable_output_validation(cls) -> Iterator[None]:
        """Within the block, `validate_output` and `validate_outputs` check types; else they let everything pass."""
        before, cls.DO_VALIDATE_OUTPUT = cls.DO_VALIDATE_OUTPUT, True
        try:
            yield
        finally:
            cls.DO_VALIDATE_OUTPUT = before

    @classmethod
    def validate_output(cls, output: object, output_type: type[T]) -> T:
        """The output; TypeError if it is checked and of another type."""
        if cls.DO_VALIDATE_OUTPUT and not isinstance(output, output_type):
            raise TypeError(f"Expected output of type {output_type}, but found type {type(output)}")
        return cast(T, output)

    @classmethod
    def validate_outputs(cls, outputs: Sequence[object], output_type: type[T]) -> list[T]:
        """As `validate_output`, for all of them."""
        return [cls.validate_output(output, output_type) for output in outputs]

    # What there is none of

    def is_tracing_enabled(self) -> bool:
        """False."""
        return False

    def do_tracing(self, scheduler_outputs: object, finished_before: object = None) -> None:
        """Does nothing, as in vLLM without an `otlp_traces_endpoint`, which is refused here."""

    def create_trace_span(self, seq_group: object) -> None:
        """Does nothing, as `do_tracing`."""

    def stop_remote_worker_execution_loop(self) -> None:
        """Does nothing: the worker is in this process, and returns after every step."""

    def get_lora_config(self) -> None:
        """None."""

    def list_loras(self) -> set[int]:
        """The empty set."""
        return set()

    @refused
    def add_lora(self, lora_request: object) -> None:
        """LoRA adapters are not supported; merge the adapter into the weights of the model."""

    def remove_lora(self, lora_id: int) -> bool:
        """False: there is none with that id."""
        return False

    @refused
    def pin_lora(self, lora_id: int) -> None:
        """LoRA adapters are not supported, so there is none to pin."""

    @refused
    def add_prompt_adapter(self, prompt_adapter_request: object) -> None:
        """Prompt adapters are not supported; put instructions into the prompt."""

    def remove_prompt_adapter(self, prompt_adapter_id: int) -> bool:
        """False: there is none with that id."""
        return False

    def list_prompt_adapters(self) -> list[int]:
        """The empty list."""
        return []
