"""Runs step plans of pooling models: as `ModelRunner`, but hidden states end in a pooler instead of a sampler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from taco.plan import StepPlan, StepResult
from taco.worker.host_memory import return_free_memory
from taco.worker.model_runner import ModelRunner
from taco.worker.pooler import Pooler
from taco.worker.transfer import to_device


@dataclass
class PendingPooling:
    """A submitted step whose results may still be on their way to the host.

    Args:
        results: indexes in the plan's samples, and their results, see `Pooler.pool`; on the host once `ready`.
    """

    plan: StepPlan
    results: list[tuple[list[int], torch.Tensor]]
    ready: torch.cuda.Event | None


class PoolingRunner(ModelRunner):
    """A `ModelRunner` whose `sampler` is a `Pooler`."""

    sampler: Pooler

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> PendingPooling:
        """Starts a step; on a CPU it is done on return."""
        self._apply_changes(plan)
        if not plan.rows:
            return_free_memory()  # the last rows have left
            return PendingPooling(plan, [], None)
        rows = np.array(plan.rows)
        counts = np.array(plan.num_tokens)
        input_ids, positions, meta = self._make_batch(rows, counts)
        further = ()
        if self.model.takes_token_types:
            types = self.sampler.token_type_ids(plan.rows, plan.num_tokens)
            further = (None if types is None else to_device(types, self.device),)
        hidden = self.model(input_ids, positions, self.kv_cache.layers, meta, *further)
        results = self.sampler.pool(plan.rows, plan.num_tokens, self._num_computed[rows].tolist(), plan.samples, hidden)
        self._num_computed[rows] += counts
        ready = None
        if self.device.type == "cuda":
            results = [(places, data.to("cpu", non_blocking=True)) for places, data in results]
            ready = torch.cuda.Event()
            ready.record()
        return PendingPooling(plan, results, ready)

    def collect(self, pending: PendingPooling) -> StepResult:
        """Waits for a step and returns what it produced."""
        if pending.ready is not None:
            pending.ready.synchronize()
        plan = pending.plan
        result = StepResult(plan.step_id, [[] for _ in plan.samples])
        for places, data in pending.results:
            # A copy for CUDA: views would keep the pinned memory that the results came through as long as a caller
            # keeps the results.
            array = data.numpy() if pending.ready is None else data.numpy().copy()
            all_finite = np.isfinite(array).all()
            for place, pooled in zip(places, array, strict=True):
                if all_finite or np.isfinite(pooled).all():
                    result.pooled[place] = pooled
                else:
                    result.errors[plan.samples[place]] = (
                        "What the model computed for this prompt is not finite; the data type of the model may be too "
                        'narrow for it: try dtype="float32".'
                    )
        return result
