from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.worker.sampler.tables import RaggedRows, RowArray, select_rows

ROWS = 4
ACTIONS = st.one_of(
    st.tuples(st.just("set"), st.integers(0, ROWS - 1), st.lists(st.integers(0, 99), max_size=40)),
    st.tuples(st.just("extend"), st.integers(0, ROWS - 1), st.lists(st.integers(0, 99), max_size=40)),
    st.tuples(st.just("increment"), st.integers(0, ROWS - 1), st.integers(0, 5)),
    st.tuples(st.just("pop"), st.integers(0, ROWS - 1), st.none()),
    st.tuples(st.just("clear"), st.integers(0, ROWS - 1), st.none()),
)


@settings(deadline=None)
@given(st.lists(ACTIONS, max_size=60), st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=6))
def test_ragged_rows_behave_like_lists(actions: list, wanted: list[int]) -> None:
    table = RaggedRows(ROWS)
    model: list[list[list[float]]] = [[] for _ in range(ROWS)]
    for action, row, argument in actions:
        if action in ("set", "extend"):
            numbers = [0.5 * token_id for token_id in argument]
            getattr(table, action)(row, argument, numbers)
            kept = [] if action == "set" else model[row]
            model[row] = kept + [[token_id, number] for token_id, number in zip(argument, numbers, strict=True)]
        elif action == "increment" and argument < len(model[row]):
            table.increment(row, argument, 2.0)
            model[row][argument][1] += 2.0
        elif action == "pop" and model[row]:
            table.pop(row)
            model[row].pop()
        elif action == "clear":
            table.clear(row)
            model[row] = []
    sources, token_ids, numbers = table.gather(np.array(wanted))
    expected = [(index, *pair) for index, row in enumerate(wanted) for pair in model[row]]
    assert list(zip(sources.tolist(), token_ids.tolist(), numbers.tolist(), strict=True)) == expected


def test_rows_that_grow_side_by_side_keep_their_pairs() -> None:
    table = RaggedRows(ROWS)
    for number in range(200):
        for row in range(ROWS):
            table.extend(row, [row], [number])
    for row in range(ROWS):
        _, token_ids, numbers = table.gather(np.array([row]))
        assert token_ids.tolist() == [row] * 200 and numbers.tolist() == list(range(200))


def test_the_room_of_a_long_row_is_given_back() -> None:
    table = RaggedRows(ROWS)
    table.set(0, range(100_000))
    table.clear(0)
    for number in range(5000):  # they fill what is left of the buffer
        table.clear(1 + number % 3)
        table.set(1 + number % 3, range(100))
    assert len(table._ids) < 10_000


def test_rows_that_come_and_go_do_not_let_the_buffer_grow() -> None:
    table = RaggedRows(ROWS)
    for turn in range(1000):
        table.set(turn % ROWS, range(100))
        if turn >= 2:
            table.clear((turn - 2) % ROWS)
    assert len(table._ids) < 5000


def test_row_array_gathers_the_latest_numbers() -> None:
    array = RowArray(3, np.float32, torch.device("cpu"))
    array.set(1, 0.25)
    assert array.on_device(np.array([1, 0, 1])).tolist() == [0.25, 0.0, 0.25]
    array.set(1, 0.5)
    assert array.on_device(np.array([1])).tolist() == [0.5]


def test_select_rows_copies_only_where_it_must() -> None:
    matrix = torch.arange(6).view(3, 2)
    assert select_rows(matrix, np.arange(3)) is matrix
    part = select_rows(matrix, np.array([0, 2]))
    part[0, 0] = 100
    assert part.tolist() == [[100, 1], [4, 5]] and matrix[0, 0] == 0
