"""Recording what the worker does with torch's profiler, into files that chrome://tracing and Perfetto show."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from taco.config import ProfilerConfig
from taco.errors import ProfilerAlreadyActiveError, TacoValidationError

logger = logging.getLogger(__name__)


class TorchProfiler:
    """Is active from `start` to `stop`, and records those steps between them that the limits leave.

    torch records the threads that it knows of, so the same thread should start the profiler and run the steps.

    Args:
        config: what to record, and where the files go.
        device: of the worker.
    """

    def __init__(self, config: ProfilerConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._profile: torch.profiler.profile | None = None
        self.is_active = False

    def start(
        self,
        prefix: str | None = None,
        delay_iterations: int | None = None,
        max_iterations: int | None = None,
        profiler_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Begins to record, now or after some steps.

        Args:
            prefix: first part of the name of the trace file; "taco" if None.
            delay_iterations, max_iterations: instead of those of the config.
            profiler_kwargs: further arguments of `torch.profiler.profile`, or others than those of the config.

        Raises:
            ProfilerAlreadyActiveError: it is active.
            TacoValidationError: a number of steps is negative.
        """
        if self.is_active:
            raise ProfilerAlreadyActiveError("The profiler is active already; call stop_profile() first.")
        for name, number in (("delay_iterations", delay_iterations), ("max_iterations", max_iterations)):
            if number is not None and number < 0:
                raise TacoValidationError(f"{name} must be at least 0, got {number}.", parameter=name, value=number)
        config = self._config
        self._prefix = prefix or "taco"
        self._num_steps_to_wait = config.delay_iterations if delay_iterations is None else delay_iterations
        self._max_steps = config.max_iterations if max_iterations is None else max_iterations
        self._num_steps = 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        options = {
            "activities": activities,
            "with_stack": config.torch_profiler_with_stack,
            "with_flops": config.torch_profiler_with_flops,
            "record_shapes": config.torch_profiler_record_shapes,
            "profile_memory": config.torch_profiler_with_memory,
        }
        profile = torch.profiler.profile(**options | (profiler_kwargs or {}))
        self.is_active = True
        self._profile = profile
        if self._num_steps_to_wait == 0:
            profile.start()

    def step(self) -> None:
        """Counts a step that has been submitted; the limits may begin or end the recording."""
        if self._profile is None:
            return
        if self._num_steps_to_wait:
            self._num_steps_to_wait -= 1
            if self._num_steps_to_wait == 0:
                self._profile.start()
            return
        self._num_steps += 1
        if self._num_steps == self._max_steps:
            self._write()

    def stop(self) -> None:
        """Ends the recording and writes its file; does nothing but warn if the profiler is not active."""
        if not self.is_active:
            logger.warning("stop_profile() has nothing to stop: the profiler is not active.")
            return
        self.is_active = False
        if self._profile is None:
            return  # written when the last step had come
        if self._num_steps_to_wait:
            logger.warning("No trace was written: %d more steps were to pass first.", self._num_steps_to_wait)
            self._profile = None
            return
        self._write()

    def _write(self) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        profile.stop()
        folder = Path(self._config.torch_profiler_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        suffix = ".gz" if self._config.torch_profiler_use_gzip else ""
        path = folder / f"{self._prefix}_rank0.{time.time_ns()}.pt.trace.json{suffix}"
        profile.export_chrome_trace(str(path))
        logger.info("Wrote the trace %s", path)
