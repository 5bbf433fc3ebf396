"""Kernels in Triton for CUDA devices, one module for each operation.

A module here imports Triton at its top, and is itself imported by the candidate that calls it, only once tensors on a
GPU come: on a CPU Triton need not be installed. Kernels have fixed block sizes instead of autotuning, whose first calls
would cost seconds, and are written so that they also run in Triton's interpreter and compile without a GPU, which is
how they are tested on any machine (tests/kernels/triton_tools.py).
"""

from __future__ import annotations

import functools
import importlib.util
import logging

logger = logging.getLogger(__name__)

_has_failed = False


@functools.cache
def installed() -> bool:
    """Whether there is a Triton; torch for CUDA brings it on Linux."""
    return importlib.util.find_spec("triton") is not None


def usable() -> bool:
    """Whether there is a Triton, and none of its kernels has failed to start."""
    return installed() and not _has_failed


def give_up(error: Exception) -> None:
    """Says that a kernel did not start, after which none is tried any more: torch's operators do their work.

    Triton compiles a part of each kernel for the host when it is first used, which takes a C compiler and the headers
    of Python, and not every machine has them.
    """
    global _has_failed
    _has_failed = True
    logger.warning(
        "Triton cannot start kernels here, so slower ones stand in for them. It needs a C compiler (gcc or clang), the "
        "headers of Python (Python.h), and a home or TRITON_CACHE_DIR that can be written. What it said: %s: %s",
        type(error).__name__,
        str(error).strip()[:300],
    )
