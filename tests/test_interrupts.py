from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from taco import interrupts
from taco.interrupts import interrupts_deferred

pytestmark = pytest.mark.usefixtures("ctrl_c_interrupts")


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_other_signals_can_interrupt_too() -> None:
    before = [signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, interrupts.interrupt)]
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_deferred():
            signal.raise_signal(signal.SIGTERM)
            interrupt()  # is ignored
            reached = True
        assert reached
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_an_interrupt_waits_for_the_end() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_deferred():
            interrupt()
            reached.append("inside")
        reached.append("after")
    assert reached == ["inside"]


def test_a_second_interrupt_comes_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        interrupt()
        interrupt()
        raise AssertionError


def test_an_interrupt_comes_before_another_error() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        interrupt()
        raise ValueError


def test_other_errors_pass_and_the_handler_comes_back() -> None:
    with pytest.raises(ValueError, match="mine"), interrupts_deferred():
        raise ValueError("mine")
    with pytest.raises(KeyboardInterrupt):
        interrupt()


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("call", [1, 2])
def test_one_that_comes_while_handlers_change_leaves_nothing_behind(
    call: int, is_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(number: int, handler: Any) -> Any:
        calls.append(handler)
        if is_before and len(calls) == call:
            interrupt()
        before = set_handler(number, handler)
        if not is_before and len(calls) == call:
            interrupt()
        return before

    set_handler = signal.signal
    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", interrupted)
        with pytest.raises(KeyboardInterrupt), interrupts_deferred():
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        interrupts.interrupt()
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        interrupt()
        reached = True
    assert reached


def test_one_that_comes_while_an_exception_is_under_way_can_be_dropped() -> None:
    with pytest.raises(ValueError, match="mine"):
        try:
            raise ValueError("mine")
        except ValueError:
            with interrupts_deferred(drops=True):
                interrupt()
            raise


def test_a_handler_of_the_program_is_left_alone() -> None:
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    with interrupts_deferred():
        interrupt()
        assert seen == [1]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_are_left_alone() -> None:
    def work() -> None:
        with interrupts_deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
