"""The engine: one loop over scheduler, executor and output processor."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

# Not used here, but seconds to import (a concrete config brings most of it): better now than while a model is loaded.
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast  # noqa: F401

from taco.config import TacoConfig
from taco.engine.arg_utils import EngineArgs
from taco.engine.beam_groups import BeamGroups
from taco.engine.block_manager import BlockManager, UnlimitedBlockManager
from taco.engine.control import EngineControl
from taco.engine.input_processor import InputProcessor, ProcessedRequest
from taco.engine.metrics import EngineMetrics
from taco.engine.output_processor import OutputProcessor
from taco.engine.pooling_input import PoolingInputProcessor
from taco.engine.pooling_output import PoolingOutputProcessor
from taco.engine.scheduler import Scheduler
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.executor.inprocess import InProcessExecutor
from taco.request import RequestStatus
from taco.usage_context import UsageContext

if TYPE_CHECKING:
    from taco.outputs import RequestOutput
    from taco.plan import StepPlan
    from taco.pooling_params import PoolingParams
    from taco.sampling_params import SamplingParams
    from taco.worker.model_runner import PendingStep

logger = logging.getLogger(__name__)


class LLMEngine(EngineControl):
    """Runs requests to their end, a step at a time.

    Requests enter by `add_request`; each `step` returns the outputs that changed. `LLM` is the convenient front.

    Args:
        config: made by `EngineArgs.create_config`.

    Raises:
        TacoValidationError: the checkpoint does not fit its config.
        OutOfMemoryError: weights and KV cache do not fit; the message gives arguments that would.
    """

    def __init__(self, config: TacoConfig) -> None:
        self._executor = None
        started = time.perf_counter()
        executor = InProcessExecutor(config)
        try:
            config = _with_cache_size(config, executor.num_device_blocks, executor.num_host_blocks)
            executor.worker.config = config
            executor.start()
            self.config = config
            self.tokenizer = _load_tokenizer(config)
            self.scheduler = Scheduler(
                config.scheduler_config,
                BlockManager(
                    num_blocks=executor.num_device_blocks,
                    num_host_blocks=executor.num_host_blocks,
                    block_size=config.cache_config.block_size,
                    enable_prefix_caching=config.cache_config.enable_prefix_caching,
                    max_idle_cached=executor.max_idle_cached_blocks,
                )
                if executor.num_device_blocks
                else UnlimitedBlockManager(),
            )
            pools = config.model_config.pooler_config is not None
            self._output_processor_class = PoolingOutputProcessor if pools else OutputProcessor
            self.input_processor = (PoolingInputProcessor if pools else InputProcessor)(config, self.tokenizer)
            self.output_processor = self._output_processor_class(config, self.tokenizer)
            self.beam_groups = self._make_beam_groups()
        except BaseException:
            executor.shutdown()
            raise
        super().__init__(executor)
        self._metrics = None
        if config.log_stats_interval_s is not None:
            self._metrics = EngineMetrics(
                config.model_config.served_model_name, config.model_config.max_model_len, config.log_stats_interval_s
            )
        self._late_outputs: list[RequestOutput] = []  # to be returned by the next step
        self._in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self._num_ahead = int(config.scheduler_config.async_scheduling)
        logger.info(
            "Loaded %s (%s, %s) in %.1f s; KV cache of %d tokens, at most %d sequences of %d tokens",
            config.model_config.served_model_name,
            config.model_config.dtype,
            config.device_config.device,
            time.perf_counter() - started,
            (executor.num_device_blocks - 1) * config.cache_config.block_size,
            config.scheduler_config.max_num_seqs,
            config.scheduler_config.max_model_len,
        )

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: object = None,
        enable_multiprocessing: bool = False,
    ) -> LLMEngine:
        """Creates an engine from flat arguments.

        Args:
            usage_context: accepted and without effect: taco reports its use to nobody.
            stat_loggers: must be None; `get_metrics` has what they would be told.
            enable_multiprocessing: accepted and without effect: the engine runs in this process.
        """
        _refuse_stat_loggers(stat_loggers)
        return cls(engine_args.create_config())

    @classmethod
    def from_vllm_config(
        cls,
        vllm_config: TacoConfig,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: object = None,
        disable_log_stats: bool = False,
    ) -> LLMEngine:
        """Creates an engine from its config; arguments as for `from_engine_args`.

        Args:
            disable_log_stats: count no metrics, although the config says so.
        """
        _refuse_stat_loggers(stat_loggers)
        return cls(dataclasses.replace(vllm_config, log_stats_interval_s=None) if disable_log_stats else vllm_config)

    # Requests

    def add_request(
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
        session_id: str | None = None,
        prompt_text: str | None = None,
        kv_hints: object = None,
        data_parallel_rank: int | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Enters one request.

        Args:
            request_id: must not be in use by an unfinished request.
            prompt: text, token ids or a prompt dictionary.
            params: `output_kind` decides what `step` returns for it; None for the model's defaults.
            arrival_time: seconds since the epoch; now if None.
            trace_headers, prompt_adapter_request: must be None; neither exists here.
            priority: smaller runs earlier under scheduling_policy="priority".
            inputs: an older name of `prompt`.
            tokenization_kwargs: see `LLM.generate`.
            prompt_text: what `RequestOutput.prompt` shows, in place of the prompt's own text.
            data_parallel_rank: must be None or 0: there is one engine.
            session_id, kv_hints, reasoning_ended, reasoning_parser_kwargs: must be None; what they are for does not
                exist here.

        Raises:
            TacoValidationError: the request is not valid; the engine is as before.
        """
        for name, value in (
            ("trace_headers", trace_headers),
            ("prompt_adapter_request", prompt_adapter_request),
            ("session_id", session_id),
            ("kv_hints", kv_hints),
            ("data_parallel_rank", data_parallel_rank or None),
            ("reasoning_ended", reasoning_ended),
            ("reasoning_parser_kwargs", reasoning_parser_kwargs),
        ):
            if value is not None:
                raise UnsupportedFeatureError(f"{name} is not supported; leave it None.", parameter=name, value=value)
        if (prompt is None) == (inputs is None):
            raise TacoValidationError(
                "A request needs one prompt: give either prompt or inputs, which is its older name.", parameter="prompt"
            )
        prompt = inputs if prompt is None else prompt
        if not isinstance(prompt_text, str | None):
            raise TacoValidationError(
                f"prompt_text must be a string or None, but is of type {type(prompt_text).__name__}.",
                parameter="prompt_text",
                value=prompt_text,
            )
        processed = self.input_processor.process(
            request_id,
            prompt,
            params,
            arrival_time=arrival_time,
            priority=priority,
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
        )
        if prompt_text is not None:
            processed.prompt = prompt_text
            if processed.finished is not None:
                processed.finished.prompt = prompt_text
        self.add_processed(processed)

    def add_processed(self, processed: ProcessedRequest) -> None:
        """Enters a request that the input processor has made."""
        self._alive()
        self.output_processor.add(processed)
        if processed.beam_options is not None and processed.children:
            self.beam_groups.add(processed)
            return
        for child in processed.children:
            self.scheduler.add(child)

    def abort_request(
        self,
        request_id: str | Iterable[str] | None = None,
        internal: bool = False,
        *,
        request_ids: str | Iterable[str] | None = None,
    ) -> None:
        """Ends requests without an output; ids of finished or unknown requests are left alone.

        Args:
            request_id: one or several.
            internal: accepted and without effect: requests have one id, the caller's.
            request_ids: another name of `request_id`.
        """
        given = request_ids if request_id is None else request_id
        if given is None or (request_id is not None and request_ids is not None):
            raise TacoValidationError(
                "Give either request_id or request_ids, which are two names of one parameter.", parameter="request_id"
            )
        aborted = {given} if isinstance(given, str) else set(given)
        self.abort(aborted)
        self._late_outputs = [output for output in self._late_outputs if output.request_id not in aborted]

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """Ends requests and returns what there is of their outputs, which is nothing for pooling models."""
        outputs: list[RequestOutput] = []
        for one in request_ids:
            for child_id in self.output_processor.child_ids(one):
                request = self.scheduler.requests.get(child_id)
                if request is not None:
                    self.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
                    if self._metrics is not None:
                        self._metrics.forget(request)
            self.beam_groups.abort(one)
            output = self.output_processor.abort(one)
            if output is not None:
                outputs.append(output)
                if self._metrics is not None:
                    self._metrics.record_output(output)
        if self._executor is not None:
            self._settle()
        return outputs

    def _abort_requests(self) -> None:
        self._finish_steps()
        self._late_outputs += self.abort(self.output_processor.request_ids())

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do."""
        return self.output_processor.num_unfinished > 0 or bool(self._late_outputs)

    def has_unfinished_requests_dp(self, has_unfinished: bool) -> bool:
        """`has_unfinished`: there is no other engine that could have some."""
        return has_unfinished

    def has_unfinished_requests_for_virtual_engine(self, virtual_engine: int) -> bool:
        """`has_unfinished_requests`, whatever the number: there is one engine."""
        return self.has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        """Requests that were added and whose last output has not been returned; `n` samples of a prompt are one."""
        return self.output_processor.num_unfinished + sum(output.finished for output in self._late_outputs)

    # The loop

    def step(self) -> list[RequestOutput]:
        """Runs one step and returns the outputs it completed or, for streaming requests, changed.

        If a step fails, all requests are aborted, the engine is clean again, and the exception is passed on.

        Raises:
            EngineAsleepError: the engine sleeps or has no weights; its requests stay.
        """
        if self._late_outputs:
            return self.take_late_outputs()
        self._check_ready()
        assert self._executor is not None
        try:
            plan = self.scheduler.schedule()
            if plan is not None:
                self._in_flight.append((plan, self._executor.submit(plan)))
            if not self._in_flight or (plan is not None and len(self._in_flight) <= self._num_ahead):
                return self._counted(self.output_processor.process([]).outputs)
            return self._collect()
        except BaseException:
            self._recover()
            raise

    def take_late_outputs(self) -> list[RequestOutput]:
        """Outputs that came between two steps, because the steps in flight had to end or requests were aborted."""
        outputs, self._late_outputs = self._late_outputs, []
        return outputs

    def _collect(self) -> list[RequestOutput]:
        """Waits for the oldest step in flight and returns its outputs."""
        assert self._executor is not None
        plan, pending = self._in_flight.popleft()
        updates = self.beam_groups.process(self.scheduler.update(plan, self._executor.collect(pending)))
        processed = self.output_processor.process(updates)
        for request, _ in processed.stopped:
            self.scheduler.finish(request, RequestStatus.FINISHED_STOPPED)
        if self._metrics is not None:
            self._metrics.record_step(plan, updates)
            self._metrics.log_if_due(self.scheduler)
        self._settle()
        return self._counted(processed.outputs)

    def _counted(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        if self._metrics is not None:
            for output in outputs:
                if output.finished:
                    self._metrics.record_output(output)
        return outputs

    def _finish_steps(self) -> None:
        try:
            while self._in_flight:
                self._late_outputs += self._collect()
        except BaseException:
            self._recover()
            raise

    def _finish_requests(self) -> None:
        outputs = []
        while self.has_unfinished_requests():
            outputs += self.step()
        self._late_outputs = outputs

    def _settle(self) -> None:
        """When nothing is unfinished, lets the worker forget what it holds of requests."""
        if self.scheduler.num_unfinished:
            return
        assert self._executor is not None
        if (farewell := self.scheduler.farewell()) is not None:
            self._in_flight.append((farewell, self._executor.submit(farewell)))
        while self._in_flight:
            plan, pending = self._in_flight.popleft()
            self.scheduler.update(plan, self._executor.collect(pending))

    def _recover(self) -> None:
        """Drops everything a failed step may have left half done; where that fails too, closes the engine."""
        if self._executor is None:  # closed meanwhile
            return
        try:
            self._in_flight.clear()
            self.scheduler.reset()
            self.beam_groups.clear()
            self.output_processor.abort_all()
            self._late_outputs.clear()
            if self._metrics is not None:
                self._metrics.forget_all()
            self._executor.reset()
        except Exception:
            logger.exception("The engine is closed: a step was broken off and has left it in a state it cannot repair.")
            self.close()

    # Tokenizer, configs, end

    def get_tokenizer(self, lora_request: object = None) -> Any:
        """The tokenizer; the same for every request."""
        if self.tokenizer is None:
            raise TacoValidationError("There is no tokenizer: skip_tokenizer_init=True was passed.")
        return self.tokenizer

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Replaces the tokenizer for requests that are added from now on."""
        if self.has_unfinished_requests():
            raise TacoValidationError("The tokenizer cannot change while requests are unfinished.")
        self.tokenizer = tokenizer
        self.input_processor.set_tokenizer(tokenizer)
        self.output_processor = self._output_processor_class(self.config, tokenizer)
        self.beam_groups = self._make_beam_groups()

    def _make_beam_groups(self) -> BeamGroups:
        # Pooling models never search, so their output processor lacks the methods for it.
        text_side: Any = self.output_processor
        return BeamGroups(self.scheduler, text_side, self.config.behaviour.rank_counts_ties)

    @property
    def vllm_config(self) -> TacoConfig:
        return self.config

    @property
    def model_config(self) -> Any:
        return self.config.model_config

    @property
    def cache_config(self) -> Any:
        return self.config.cache_config

    @property
    def scheduler_config(self) -> Any:
        return self.config.scheduler_config

    @property
    def parallel_config(self) -> Any:
        return self.config.parallel_config

    @property
    def device_config(self) -> Any:
        return self.config.device_config

    @property
    def model_executor(self) -> InProcessExecutor | None:
        """What runs the steps; None after `close`. Programs delete it to free memory, which closes the engine."""
        return self._executor

    @model_executor.deleter
    def model_executor(self) -> None:
        self.close()

    def get_model_config(self) -> Any:
        return self.config.model_config

    def get_parallel_config(self) -> Any:
        return self.config.parallel_config

    def get_scheduler_config(self) -> Any:
        return self.config.scheduler_config

    def get_supported_tasks(self) -> tuple[str, ...]:
        """What the model can do: ("generate",), or pooling tasks."""
        pooler = self.config.model_config.pooler_config
        return ("generate",) if pooler is None else pooler.tasks

    def close(self) -> None:
        """Aborts what is unfinished and gives all memory back; calls after this raise `EngineDeadError`."""
        executor, self._executor = self._executor, None
        if executor is not None:
            self._in_flight.clear()
            executor.shutdown()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # See LLM.__del__.
        if getattr(self, "_executor", None) is not None and not is_finalizing():
            self.close()


def _refuse_stat_loggers(stat_loggers: object) -> None:
    if stat_loggers is not None:
        raise UnsupportedFeatureError("stat_loggers is not supported; leave it None.", parameter="stat_loggers")


def _load_tokenizer(config: TacoConfig) -> Any:
    model = config.model_config
    if model.skip_tokenizer_init:
        return None
    from taco.tokenizer.loading import load_tokenizer

    is_models_own = model.tokenizer == model.model and model.tokenizer_revision == model.revision
    return load_tokenizer(
        model.source if is_models_own else model.tokenizer,
        tokenizer_mode=model.tokenizer_mode,
        trust_remote_code=model.trust_remote_code,
        revision=model.tokenizer_revision,
        download_dir=config.load_config.download_dir,
        hf_token=model.hf_token,
    )


def _with_cache_size(config: TacoConfig, num_device_blocks: int, num_host_blocks: int) -> TacoConfig:
    """The config with the block counts, and with the model length that fits them if it was left to us."""
    cache = dataclasses.replace(config.cache_config, num_gpu_blocks=num_device_blocks, num_cpu_blocks=num_host_blocks)
    config = dataclasses.replace(config, cache_config=cache)
    fitting = (num_device_blocks - 1) * cache.block_size
    if num_device_blocks == 0 or config.model_config.max_model_len <= fitting:
        return config
    assert config.model_config.fit_max_model_len
    return dataclasses.replace(
        config,
        model_config=dataclasses.replace(config.model_config, max_model_len=fitting),
        scheduler_config=dataclasses.replace(config.scheduler_config, max_model_len=fitting),
    )
