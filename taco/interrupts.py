"""Ctrl-C, and other signals that mean the same, in the middle of a batch."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_is_deferring = False  # all of this is of the main thread, in which Python handles signals
_is_pending = False


def interrupt(*signal_and_frame: object) -> None:
    """Does what Ctrl-C does by default: raises KeyboardInterrupt, unless that is deferred. A handler for signals."""
    global _is_pending
    if not _is_deferring or _is_pending:
        raise KeyboardInterrupt
    _is_pending = True


@contextlib.contextmanager
def interrupts_deferred(*, drops: bool = False) -> Iterator[None]:
    """Within this context Ctrl-C waits for its end, so that nothing is left half done; a second one comes at once.

    Nothing changes in other threads than the main one, and a handler of the program's own is left alone.

    Args:
        drops: forget the first one, for a context in which an exception is under way already.
    """
    global _is_deferring, _is_pending
    if threading.current_thread() is not threading.main_thread() or _is_deferring:
        yield
        return
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # Setting a handler runs the old one for a signal that has come before, and that may raise.
    try:
        _is_deferring, _is_pending = True, False
        if is_default:
            signal.signal(signal.SIGINT, interrupt)
        yield
    finally:
        try:
            if is_default:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        finally:
            _is_deferring = False
        if _is_pending and not drops:
            raise KeyboardInterrupt
