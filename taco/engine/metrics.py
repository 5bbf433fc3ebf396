"""What an engine counts of its work, under the names of both vLLM versions.

`EngineMetrics` is told of each step and of each output; `snapshot` is what `LLM.get_metrics` returns.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from taco.outputs import RequestOutput

if TYPE_CHECKING:
    from taco.engine.scheduler import Scheduler
    from taco.plan import StepPlan
    from taco.request import Request, RequestUpdate

logger = logging.getLogger(__name__)


@dataclass
class Metric:
    """One metric.

    Args:
        name: begins with "vllm:".
        labels: "model_name" and "engine", and what tells metrics of the same name apart.
    """

    name: str
    labels: dict[str, str]


@dataclass
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclass
class Vector(Metric):
    """Several counters in a fixed order."""

    values: list[int]


@dataclass
class Gauge(Metric):
    """How something is at the moment."""

    value: float


@dataclass
class Histogram(Metric):
    """How often which values occurred.

    Args:
        count: number of values.
        sum: their sum.
        buckets: how many were at most the number that the key states; the last key is "+Inf".
    """

    count: int
    sum: float
    buckets: dict[str, int]


class _Distribution:
    """Values counted in buckets."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def metric(self, name: str, labels: dict[str, str]) -> Histogram:
        keys = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = dict(zip(keys, accumulate(self._counts), strict=True))
        return Histogram(name, labels, sum(self._counts), self._sum, buckets)


# The buckets of vLLM, in seconds and in tokens, so that its dashboards and reports fit.
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_NEXT_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SAMPLES = (1, 2, 5, 10, 20)

# Names of vLLM 0.33, and those of vLLM 0.6 for the same where they differ.
_OLD_NAMES = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "num_preemptions": "num_preemptions_total",
    "prompt_tokens": "prompt_tokens_total",
    "generation_tokens": "generation_tokens_total",
    "request_success": "request_success_total",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}


def _bounds_up_to(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to a limit."""
    bounds = [digit * 10**power for power in range(len(str(limit))) for digit in (1, 2, 5)]
    return [bound for bound in bounds if bound <= limit]


class EngineMetrics:
    """Counts what an engine does.

    Times are those of the requests' own metrics. Times and lengths of requests are counted when they finish, prompts
    when their first token comes, once for each sample. The tokens of a beam search are those of the beams it returns.

    Args:
        model_name: for the labels.
        max_model_len: longest sequence, for the buckets of lengths.
        interval_s: seconds between two lines in the log.
    """

    def __init__(self, model_name: str, max_model_len: int, interval_s: float) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._interval_s = interval_s
        self._num_prompt_tokens = self._num_output_tokens = 0
        self._num_cache_hits = 0
        self._num_finished = dict.fromkeys(("stop", "length", "abort", "error", "repetition"), 0)
        self._last_token_time: dict[Request, float] = {}  # of unfinished sequences that have a token
        lengths = _bounds_up_to(max_model_len)
        self._distributions = {
            "iteration_tokens_total": _Distribution(_STEP_TOKENS),
            "time_to_first_token_seconds": _Distribution(_FIRST_TOKEN_S),
            "inter_token_latency_seconds": _Distribution(_NEXT_TOKEN_S),
            "e2e_request_latency_seconds": _Distribution(_REQUEST_S),
            "request_queue_time_seconds": _Distribution(_REQUEST_S),
            "request_inference_time_seconds": _Distribution(_REQUEST_S),
            "request_prefill_time_seconds": _Distribution(_REQUEST_S),
            "request_decode_time_seconds": _Distribution(_REQUEST_S),
            "request_time_per_output_token_seconds": _Distribution(_NEXT_TOKEN_S),
            "request_prompt_tokens": _Distribution(lengths),
            "request_generation_tokens": _Distribution(lengths),
            "request_max_num_generation_tokens": _Distribution(lengths),
            "request_params_n": _Distribution(_SAMPLES),
        }
        self._logged_time = time.monotonic()
        self._logged_tokens = (0, 0)

    # Told by the engine

    def record_step(self, plan: StepPlan, updates: Iterable[RequestUpdate]) -> None:
        """A step has ended; `updates` are what it did to requests."""
        if plan.rows:
            self._distributions["iteration_tokens_total"].add(plan.num_scheduled_tokens)
        now = time.time()
        latency = self._distributions["inter_token_latency_seconds"]
        for update in updates:
            request = update.request
            if update.new_token_ids or update.pooled is not None:
                self._num_output_tokens += len(update.new_token_ids)
                last = self._last_token_time.get(request)
                if last is None:
                    self._num_prompt_tokens += request.num_prompt_tokens
                    self._num_cache_hits += max(0, request.num_cached_tokens)
                else:
                    latency.add(now - last)
                self._last_token_time[request] = now
            if request.status.is_finished:
                self._last_token_time.pop(request, None)

    def record_output(self, output: Any) -> None:
        """An output of a request that has finished leaves the engine."""
        if not isinstance(output, RequestOutput):
            self._num_finished["stop" if output.error is None else "error"] += 1
            return
        for completion in output.outputs:
            if completion.finish_reason is not None:
                self._num_finished[completion.finish_reason] += 1
        metrics = output.metrics
        if metrics is None or not metrics.first_scheduled_time or not metrics.first_token_time:
            return  # it had no part in a step
        assert metrics.finished_time is not None
        add = {name: distribution.add for name, distribution in self._distributions.items()}
        add["time_to_first_token_seconds"](metrics.first_token_time - metrics.arrival_time)
        add["e2e_request_latency_seconds"](metrics.finished_time - metrics.arrival_time)
        add["request_queue_time_seconds"](metrics.first_scheduled_time - metrics.arrival_time)
        add["request_inference_time_seconds"](metrics.last_token_time - metrics.first_scheduled_time)
        add["request_prefill_time_seconds"](metrics.first_token_time - metrics.first_scheduled_time)
        add["request_decode_time_seconds"](metrics.last_token_time - metrics.first_token_time)
        add["request_prompt_tokens"](len(output.prompt_token_ids or ()))
        add["request_params_n"](len(output.outputs))
        lengths = [len(completion.token_ids) for completion in output.outputs]
        add["request_generation_tokens"](sum(lengths))
        add["request_max_num_generation_tokens"](max(lengths))
        if max(lengths) > 1:
            duration = metrics.last_token_time - metrics.first_token_time
            add["request_time_per_output_token_seconds"](duration / (max(lengths) - 1))

    def forget(self, request: Request) -> None:
        """A sequence was aborted."""
        self._last_token_time.pop(request, None)

    def forget_all(self) -> None:
        """Every sequence was aborted."""
        self._last_token_time.clear()

    # Shown

    def snapshot(self, scheduler: Scheduler) -> list[Metric]:
        """All metrics now; what both versions of vLLM count, but name differently, is there under both names."""
        labels = self._labels
        blocks = scheduler.blocks
        used = 1 - blocks.pool.num_free / blocks.num_usable_blocks
        num_host_blocks = blocks.host.num_blocks
        num_swapped = sum(bool(request.host_block_ids) for request in scheduler.waiting)
        gauges = {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": len(scheduler.waiting) - num_swapped,
            "num_requests_swapped": num_swapped,
            "kv_cache_usage_perc": used,
            "cpu_cache_usage_perc": 1 - blocks.host.num_free / num_host_blocks if num_host_blocks else 0.0,
        }
        counters = {
            "num_preemptions": scheduler.num_preemptions,
            "prompt_tokens": self._num_prompt_tokens,
            "generation_tokens": self._num_output_tokens,
            "prefix_cache_queries": self._num_prompt_tokens,
            "prefix_cache_hits": self._num_cache_hits,
        }
        metrics: list[Metric] = []
        for name, value in gauges.items():
            metrics += [Gauge(full, dict(labels), float(value)) for full in _names(name)]
        for name, count in counters.items():
            metrics += [Counter(full, dict(labels), count) for full in _names(name)]
        for reason, count in self._num_finished.items():
            extended = {**labels, "finished_reason": reason}
            metrics += [Counter(full, dict(extended), count) for full in _names("request_success")]
        for name, distribution in self._distributions.items():
            metrics += [distribution.metric(full, dict(labels)) for full in _names(name)]
        return metrics

    def log_if_due(self, scheduler: Scheduler) -> None:
        """Writes a line to the log, if the last one is long enough ago."""
        if time.monotonic() - self._logged_time >= self._interval_s:
            self.log(scheduler)

    def log(self, scheduler: Scheduler) -> None:
        """Writes a line to the log: what was done since the last one, and what is going on."""
        now = time.monotonic()
        seconds = max(now - self._logged_time, 1e-9)
        prompt_tokens, output_tokens = self._logged_tokens
        logger.info(
            "%.1f prompt tokens/s, %.1f generated tokens/s; %d requests running, %d waiting; KV cache %.1f %% in use, "
            "%.1f %% of prompts found in it",
            (self._num_prompt_tokens - prompt_tokens) / seconds,
            (self._num_output_tokens - output_tokens) / seconds,
            len(scheduler.running),
            len(scheduler.waiting),
            100 * (1 - scheduler.blocks.pool.num_free / scheduler.blocks.num_usable_blocks),
            100 * self._num_cache_hits / max(1, self._num_prompt_tokens),
        )
        self._logged_time = now
        self._logged_tokens = (self._num_prompt_tokens, self._num_output_tokens)


def _names(name: str) -> list[str]:
    return ["vllm:" + known for known in (name, _OLD_NAMES.get(name)) if known is not None]
