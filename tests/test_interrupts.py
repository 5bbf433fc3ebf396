from __future__ import annotations

import signal
import threading

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
