from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taco.engine.prefix_order import prefix_order

BLOCK = 2
prompts = st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=12)


@given(prompts)
def test_prompts_that_share_blocks_stand_together(rows: list[list[int]]) -> None:
    order = prefix_order(rows, BLOCK)
    assert sorted(order) == list(range(len(rows)))
    for length in (BLOCK, 2 * BLOCK, 4 * BLOCK):
        prefixes = [tuple(rows[index][:length]) for index in order if len(rows[index]) >= length]
        runs = [prefix for place, prefix in enumerate(prefixes) if place == 0 or prefixes[place - 1] != prefix]
        assert len(runs) == len(set(runs)), "a prefix comes back after another one"


@given(prompts)
def test_groups_stand_in_the_order_of_their_first_prompts(rows: list[list[int]]) -> None:
    order = prefix_order(rows, BLOCK)
    firsts: dict[object, int] = {}
    for index in order:
        prefix = tuple(rows[index][:BLOCK])
        firsts.setdefault(prefix if len(prefix) == BLOCK else index, index)
    assert list(firsts.values()) == sorted(firsts.values())


def test_prompts_without_anything_in_common_keep_their_order() -> None:
    assert prefix_order([[index, 0, 0] for index in range(5)], BLOCK) == list(range(5))
    assert prefix_order([[1], [1], [], [1]], BLOCK) == [0, 1, 2, 3]


def test_a_thousand_equal_long_prompts_take_few_steps() -> None:
    rows = [[7] * 5000] * 1000
    assert prefix_order(rows, 16) == list(range(1000))
