"""The engine: one loop over scheduler, executor and output processor."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

# Not used here, but seconds to import (a concrete config brings most of it): better now than while a model is loaded.
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast  # noqa: F401

from taco import envs
from taco.config import TacoConfig
from taco.engine.arg_utils import EngineArgs
from taco.engine.beam_groups import BeamGroups
from taco.engine.block_manager import BlockManager, UnlimitedBlockManager
from taco.engine.control import EngineControl
from taco.engine.grammar_gate import GrammarGate
from taco.engine.input_processor import InputProcessor, ProcessedRequest
from taco.engine.metrics import EngineMetrics
from taco.engine.output_processor import OutputProcessor
from taco.engine.pooling_input import PoolingInputProcessor
from taco.engine.pooling_output import PoolingOutputProcessor
from taco.engine.scheduler import Scheduler
from taco.errors import AbsentAttribute, TacoValidationError, forget_locals, refuse_given
from taco.executor.inprocess import InProcessExecutor
from taco.guided.compiler import GrammarCompiler
from taco.models.loader.source import headers_kept
from taco.request import RequestStatus, RequestUpdate
from taco.tokenizer.group import TokenizerGroup
from taco.tokenizer.loading import add_vocabulary_limits
from taco.usage_context import UsageContext

if TYPE_CHECKING:
    from taco.outputs import RequestOutput
    from taco.plan import StepPlan
    from taco.pooling_params import PoolingParams
    from taco.sampling_params import SamplingParams
    from taco.worker.model_runner import PendingStep

logger = logging.getLogger(__name__)

_GRAMMAR_WAIT_S = 0.1  # in a step that has nothing else to do


class LLMEngine(EngineControl):
    """Runs requests to their end, a step at a time.

    Requests enter by `add_request`; each `step` returns the outputs that changed. `LLM` is the convenient front.

    `from_engine_args` is the usual way to make one.

    Args:
        vllm_config: made by `EngineArgs.create_config`.
        executor_class: what carries plans to the worker: `InProcessExecutor`, or a class derived from it.
        log_stats: count metrics, and write a line about them to the log now and then.
        stat_loggers, input_registry, mm_registry: must be None: metrics are read with `get_metrics`, and there are no
            images, audio or video.
        usage_context, aggregate_engine_logging, multiprocess_mode, use_cached_outputs: accepted and without effect:
            there is one engine in this process, whose outputs are new objects, and its use is reported to nobody.

    Raises:
        TacoValidationError: the checkpoint does not fit its config.
        OutOfMemoryError: weights and KV cache do not fit; the message gives arguments that would.
    """

    def __init__(
        self,
        vllm_config: TacoConfig,
        executor_class: type[InProcessExecutor],
        log_stats: bool,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: object = None,
        input_registry: None = None,
        mm_registry: None = None,
        use_cached_outputs: bool = False,
        *,
        aggregate_engine_logging: bool = False,
        multiprocess_mode: bool = False,
    ) -> None:
        refuse_given(stat_loggers=stat_loggers, input_registry=input_registry, mm_registry=mm_registry)
        config = _with_stats(vllm_config, log_stats)
        self._executor = None
        started = time.perf_counter()
        self.grammars = GrammarCompiler(
            functools.partial(_open_backends, config.model_config.vocab_size),
            default_backend=config.guided_decoding_config.backend,
        )
        self.grammar_gate = GrammarGate(self.grammars)
        executor = executor_class(config, self.grammars)
        try:
            config = _with_cache_size(config, executor.num_device_blocks, executor.num_host_blocks)
            executor.worker.config = config
            executor.start()
            self.config = config
            tokenizer = _load_tokenizer(config)
            self.grammars.set_tokenizer(tokenizer)
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
            self.input_processor = (
                PoolingInputProcessor(config, tokenizer) if pools else InputProcessor(config, tokenizer, self.grammars)
            )
            self.output_processor = self._output_processor_class(config, tokenizer)
            self.beam_groups = self._make_beam_groups()
        except BaseException as error:
            forget_locals(error)
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
            config.model_config.dtype_name,
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
        with headers_kept():
            return cls.from_vllm_config(engine_args.create_config(), usage_context, stat_loggers)

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
        log_stats = vllm_config.log_stats_interval_s is not None and not disable_log_stats
        return cls(vllm_config, InProcessExecutor, log_stats, usage_context, stat_loggers)

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
        refuse_given(
            trace_headers=trace_headers,
            prompt_adapter_request=prompt_adapter_request,
            session_id=session_id,
            kv_hints=kv_hints,
            data_parallel_rank=data_parallel_rank or None,
            reasoning_ended=reasoning_ended,
            reasoning_parser_kwargs=reasoning_parser_kwargs,
        )
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
        try:
            waits = self.grammar_gate.holds(processed)
        except BaseException:
            self.output_processor.abort(processed.request_id)
            raise
        if not waits:
            self._start_request(processed)

    def _start_request(self, processed: ProcessedRequest) -> None:
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
                self.grammar_gate.discard(output.request_id)
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
            failed = self._start_compiled()
            # A grammar may have more to say about a step's tokens than that they were drawn.
            num_ahead = 0 if self.scheduler.num_guided else self._num_ahead
            if len(self._in_flight) > num_ahead:
                return self._collect(failed)
            plan = self.scheduler.schedule()
            if plan is not None:
                self._in_flight.append((plan, self._executor.submit(plan)))
            if self._in_flight and (plan is None or len(self._in_flight) > num_ahead):
                return self._collect(failed)
            outputs = self._counted(self.output_processor.process(failed).outputs)
            if plan is None and not outputs and len(self.grammar_gate):
                self.grammar_gate.wait(_GRAMMAR_WAIT_S)
            return outputs
        except BaseException:
            self._recover()
            raise

    def take_late_outputs(self) -> list[RequestOutput]:
        """Outputs that came between two steps, because the steps in flight had to end or requests were aborted."""
        outputs, self._late_outputs = self._late_outputs, []
        return outputs

    def _start_compiled(self) -> list[RequestUpdate]:
        """Starts requests whose grammars are there; returns updates of those whose grammars cannot be made."""
        if not len(self.grammar_gate):
            return []
        compiled, failed = self.grammar_gate.take()
        for processed in compiled:
            self._start_request(processed)
        return failed

    def _collect(self, others: list[RequestUpdate] | None = None) -> list[RequestOutput]:
        """Waits for the oldest step in flight and returns its outputs, and those of other updates."""
        assert self._executor is not None
        plan, pending = self._in_flight.popleft()
        updates = self.beam_groups.process(self.scheduler.update(plan, self._executor.collect(pending)))
        processed = self.output_processor.process([*others, *updates] if others else updates)
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
            self.grammar_gate.clear()
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
        """The tokenizer, the same for every request, with `max_token_id` and `max_chars_per_token` as in vLLM."""
        tokenizer = self.input_processor.tokenizer
        if tokenizer is None:
            raise TacoValidationError("There is no tokenizer: skip_tokenizer_init=True was passed.")
        add_vocabulary_limits(tokenizer)
        return tokenizer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, in vLLM 0.6 in a `TokenizerGroup`; None if there is none."""
        if self.input_processor.tokenizer is None:
            return None
        tokenizer = self.get_tokenizer()
        return TokenizerGroup(tokenizer) if self.config.behaviour.engine_tokenizer_is_group else tokenizer

    def get_tokenizer_group(self, group_type: type[TokenizerGroup] = TokenizerGroup) -> TokenizerGroup:
        """The tokenizer as vLLM 0.6 wraps it; TypeError where another class is asked for."""
        group = TokenizerGroup(self.get_tokenizer())
        if not isinstance(group, group_type):
            raise TypeError(f"Expected a tokenizer group of type {group_type}, but found type {type(group)}")
        return group

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Replaces the tokenizer for requests that are added from now on."""
        if self.has_unfinished_requests():
            raise TacoValidationError("The tokenizer cannot change while requests are unfinished.")
        self.grammars.set_tokenizer(tokenizer)
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

    @property
    def decoding_config(self) -> Any:
        return self.config.guided_decoding_config

    @property
    def lora_config(self) -> None:
        return None

    @property
    def log_stats(self) -> bool:
        """Whether metrics are counted."""
        return self._metrics is not None

    @property
    def stat_loggers(self) -> dict[str, Any]:
        """Empty: `get_metrics` has what loggers would be told."""
        return {}

    detokenizer = AbsentAttribute("take get_tokenizer().decode.")
    input_preprocessor = AbsentAttribute("take input_processor, whose methods differ.")
    renderer = AbsentAttribute("take get_tokenizer().apply_chat_template.")
    engine_core = AbsentAttribute("there is one engine in this process; take its own methods, or model_executor.")

    def get_model_config(self) -> Any:
        return self.config.model_config

    def get_parallel_config(self) -> Any:
        return self.config.parallel_config

    def get_scheduler_config(self) -> Any:
        return self.config.scheduler_config

    def get_decoding_config(self) -> Any:
        return self.config.guided_decoding_config

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


def _with_stats(config: TacoConfig, log_stats: bool) -> TacoConfig:
    """The config, which then counts metrics or does not."""
    interval_s = (config.log_stats_interval_s or envs.log_stats_interval_s()) if log_stats else None
    return dataclasses.replace(config, log_stats_interval_s=interval_s)


def _open_backends(vocab_size: int, tokenizer: Any) -> Any:
    # Not before it is used: the libraries take a moment to import.
    from taco.guided.selection import Backends
    from taco.guided.vocabulary import make_vocabulary

    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Backends(make_vocabulary(tokenizer, vocab_size), num_threads=min(num_cpus, 16))


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
