"""Python's garbage collector during long runs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def older_objects_spared() -> Iterator[None]:
    """Within this context the collector does not look at objects that existed before.

    What a process has imported makes hundreds of thousands of objects, and a run that returns many small ones has the
    collector walk through all of them again and again. Objects made inside are collected as usual; older ones are again
    after the context. Nothing changes where the program has frozen objects itself (`gc.freeze`).
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
