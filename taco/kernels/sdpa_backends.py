"""Which of torch's attention kernels may be chosen."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from torch.nn.attention import SDPBackend, sdpa_kernel

_lock = threading.Lock()


@contextlib.contextmanager
def only(backends: Sequence[SDPBackend]) -> Iterator[None]:
    """Within this context torch chooses among these. That is a setting of the process: one thread at a time has it."""
    with _lock, sdpa_kernel(list(backends)):
        yield
