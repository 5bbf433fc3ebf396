"""Carries plans to a worker in the same process."""

from __future__ import annotations

from taco.config import TacoConfig
from taco.plan import StepPlan, StepResult
from taco.worker.memory import explain_device_memory
from taco.worker.model_runner import PendingStep
from taco.worker.worker import Worker


class InProcessExecutor:
    """One worker on one device. A step may be submitted before the previous one has been collected.

    Loading happens in the constructor; the numbers of blocks are then known, and `start` makes the KV cache.
    """

    def __init__(self, config: TacoConfig) -> None:
        self.worker = Worker(config)
        advice = "free memory that other processes hold, or take a smaller model or data type"
        with explain_device_memory("the weights", advice):
            self.worker.load_model()
        self.num_device_blocks = self.worker.num_device_blocks()
        self.num_host_blocks = self.worker.num_host_blocks()
        self.max_idle_cached_blocks = self.worker.max_idle_cached_blocks()

    def start(self) -> None:
        """Takes the memory of the KV cache."""
        self.worker.start(self.num_device_blocks, self.num_host_blocks)

    def submit(self, plan: StepPlan) -> PendingStep:
        """Starts a step."""
        return self.worker.submit(plan)

    def collect(self, pending: PendingStep) -> StepResult:
        """Waits for a step; to be called in the order of submission."""
        return self.worker.collect(pending)

    def reset(self) -> None:
        """Forgets every row and step, after a step has failed."""
        self.worker.reset()

    def shutdown(self) -> None:
        """Gives all memory back."""
        self.worker.shutdown()
