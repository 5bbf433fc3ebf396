"""Automata that other processes build."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from taco.guided.outlines_builder import OutlinesBuilder
from taco.guided.protocol import GrammarError

TOKENS = {bytes([byte]): [byte] for byte in range(256)}
ENDLESS = r"(?:\W{1,3}.{1,4}\w{2,3}[^a]{0,6}\D){1,7}"  # minutes and gigabytes


@pytest.fixture
def builder() -> OutlinesBuilder:
    return OutlinesBuilder(256, TOKENS, build_seconds=5)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_automata_come_back_one_after_the_other_from_one_process(builder: OutlinesBuilder) -> None:
    for regex, text in (("ab", b"ab"), ("[a-c]{2}", b"cb")):
        index = builder.build(regex)
        state = index.get_initial_state()
        for byte in text:
            state = index.get_next_state(state, byte)
        assert index.is_final_state(state)
    assert len(builder._alive) == 1


def test_what_the_library_refuses_does_not_end_the_process(builder: OutlinesBuilder) -> None:
    with pytest.raises(GrammarError, match="cannot build an automaton: ValueError"):
        builder.build("(")
    assert builder.build("a") is not None and len(builder._alive) == 1


def test_what_takes_too_long_is_given_up_and_its_process_ended() -> None:
    builder = OutlinesBuilder(256, TOKENS, build_seconds=1)
    builder.build("a")
    [process] = builder._alive
    started = time.monotonic()
    with pytest.raises(GrammarError, match=r"in 1 s\..*llguidance"):
        builder.build(ENDLESS)
    assert time.monotonic() - started < 30 and not is_alive(process.pid)
    assert builder.build("b") is not None


def test_a_process_that_has_ended_meanwhile_is_replaced_and_ctrl_c_ends_none(builder: OutlinesBuilder) -> None:
    builder.build("a")
    [process] = builder._alive
    process.send_signal(signal.SIGINT)
    builder.build("b")
    assert builder._alive == [process]
    process.kill()
    process.wait()
    assert builder.build("c") is not None
    assert len(builder._alive) == 1 and builder._alive != [process]


def test_a_process_that_ends_at_work_is_no_late_one(builder: OutlinesBuilder) -> None:
    builder.build("a")
    [process] = builder._alive
    threading.Timer(1, process.kill).start()
    with pytest.raises(GrammarError, match="perhaps 4 GiB did not suffice"):
        builder.build(ENDLESS)
    assert not builder._alive


def test_no_process_outlives_its_builder(builder: OutlinesBuilder) -> None:
    local = OutlinesBuilder(256, TOKENS)
    local.build("a")
    pid = local._alive[0].pid
    del local
    assert not is_alive(pid)
