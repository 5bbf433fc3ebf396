"""An engine without a model: real input and output processing around a script that says which token comes next."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

from taco.compat import behaviour_for
from taco.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, TacoConfig
from taco.engine.input_processor import InputProcessor, ProcessedRequest
from taco.engine.output_processor import OutputProcessor
from taco.engine.stopping import check_stop
from taco.errors import EngineDeadError
from taco.outputs import RequestOutput
from taco.plan import LogprobRows
from taco.request import Request, RequestStatus, RequestUpdate

Script = Callable[[Request], int]


def make_config(
    version: str = "0.6",
    *,
    vocab_size: int = 400,
    max_model_len: int = 64,
    max_num_seqs: int = 4,
    policy: Any = "fcfs",
    generation_config: dict[str, Any] | None = None,
    default_sampling_params: dict[str, Any] | None = None,
    chat_template: str | None = None,
    max_logprobs: int = 20,
    logprobs_mode: str = "processed_logprobs",
    seed: int = 0,
    skip_tokenizer_init: bool = False,
) -> TacoConfig:
    """A config with the parts that input and output processing read."""
    hf_config: Any = types.SimpleNamespace(vocab_size=vocab_size)
    source: Any = None
    return TacoConfig(
        model_config=ModelConfig(
            model="fake",
            source=source,
            tokenizer="fake",
            dtype_name="float32",
            seed=seed,
            max_model_len=max_model_len,
            max_logprobs=max_logprobs,
            logprobs_mode=logprobs_mode,
            served_model_name="fake",
            hf_config=hf_config,
            hf_text_config=hf_config,
            generation_config=generation_config or {},
            default_sampling_params=default_sampling_params or {},
            vocab_size=vocab_size,
            chat_template=chat_template,
            skip_tokenizer_init=skip_tokenizer_init,
        ),
        cache_config=CacheConfig(kv_cache_dtype="float32"),
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=256, max_model_len=max_model_len, policy=policy
        ),
        device_config=DeviceConfig(device="cpu"),
        behaviour=behaviour_for(version),
    )


def logprob_rows(ids: list[list[int]], logprobs: list[list[float]], ranks: list[int]) -> LogprobRows:
    return LogprobRows(np.array(ids, np.int32), np.array(logprobs, np.float32), np.array(ranks, np.int32))


class FakeEngine:
    """Runs `max_num_seqs` sequences at a time; each draws `script(request)` once a step.

    A script may raise `RowError` to fail its row, or anything else to fail the step.
    """

    def __init__(self, config: TacoConfig, tokenizer: Any, script: Script) -> None:
        self.config = config
        self.model_config = config.model_config
        self.scheduler_config = config.scheduler_config
        self.device_config = config.device_config
        self.script = script
        self.tokenizer = tokenizer
        self.input_processor = InputProcessor(config, tokenizer)
        self.output_processor = OutputProcessor(config, tokenizer)
        self.requests: list[Request] = []
        self.max_unfinished = 0
        self.max_sequences = 0
        self.is_closed = False

    def set_tokenizer(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.input_processor.set_tokenizer(tokenizer)
        self.output_processor = OutputProcessor(self.config, tokenizer)

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.add_processed(self.input_processor.process(request_id, prompt, params))

    def add_processed(self, processed: ProcessedRequest) -> None:
        if self.is_closed:
            raise EngineDeadError("closed")
        self.output_processor.add(processed)
        self.requests += processed.children
        self.max_unfinished = max(self.max_unfinished, self.output_processor.num_unfinished)
        self.max_sequences = max(self.max_sequences, len(self.requests))

    def has_unfinished_requests(self) -> bool:
        return self.output_processor.num_unfinished > 0

    def get_num_unfinished_requests(self) -> int:
        return self.output_processor.num_unfinished

    def abort_request(self, request_id: str | list[str]) -> None:
        for one in [request_id] if isinstance(request_id, str) else request_id:
            children = self.output_processor.child_ids(one)
            self.requests = [request for request in self.requests if request.request_id not in children]
            self.output_processor.abort(one)

    def why_idle(self) -> None:
        return None

    def step(self) -> list[RequestOutput]:
        updates = [self._advance(request) for request in self.requests[: self.config.scheduler_config.max_num_seqs]]
        processed = self.output_processor.process(updates)
        for request, _ in processed.stopped:
            request.status = RequestStatus.FINISHED_STOPPED
        self.requests = [request for request in self.requests if not request.status.is_finished]
        return processed.outputs

    def _advance(self, request: Request) -> RequestUpdate:
        try:
            token_id = self.script(request)
        except RowError as error:
            request.error = str(error)
            request.status = RequestStatus.FINISHED_ERROR
            return RequestUpdate(request, [])
        request.token_ids.append(token_id)
        status = check_stop(request)
        if status is not None:
            request.status = status
        logprobs = None
        if request.params.logprobs is not None:
            # Later samples are the better ones, so that their order shows.
            value = -1.0 / (1 + int(request.request_id.split("_")[0]))
            logprobs = logprob_rows([[token_id]], [[value]], [1])
        return RequestUpdate(request, [token_id], logprobs)

    def close(self) -> None:
        self.is_closed = True


class RowError(Exception):
    pass
