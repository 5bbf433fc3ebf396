from __future__ import annotations

import itertools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taco.logprobs import FlatLogprobs, Logprob

logprob = st.builds(Logprob, st.floats(max_value=0), st.none() | st.integers(1, 9), st.none() | st.text(max_size=3))
positions = st.lists(st.none() | st.dictionaries(st.integers(0, 99), logprob, max_size=4), max_size=6)


def flat(items: list[dict[int, Logprob] | None]) -> FlatLogprobs:
    result = FlatLogprobs()
    result.extend(items)
    return result


@given(positions)
def test_flat_logprobs_read_like_the_list_they_were_made_of(items: list[dict[int, Logprob] | None]) -> None:
    result = flat(items)
    plain = [item or {} for item in items]
    assert len(result) == len(plain)
    assert list(result) == plain
    assert [result[i] for i in range(-len(plain), len(plain))] == plain + plain
    assert [list(position) for position in result] == [list(position) for position in plain]  # order of entries
    assert pickle.loads(pickle.dumps(result)) == result


@given(positions, st.slices(6))
def test_slices_are_flat_logprobs_of_the_sliced_list(items: list[dict[int, Logprob] | None], part: slice) -> None:
    sliced = flat(items)[part]
    assert sliced == flat(items[part])


@given(positions, positions)
def test_extending_by_flat_logprobs_is_extending_by_their_positions(
    first: list[dict[int, Logprob] | None], second: list[dict[int, Logprob] | None]
) -> None:
    result = flat(first)
    result.extend(flat(second))
    assert result == flat(first + second)
    result.extend(result)
    assert result == flat(2 * (first + second))


def test_append_fast_takes_endless_iterables_and_the_later_of_two_equal_tokens() -> None:
    result = FlatLogprobs()
    result.append_fast([7, 3, 7], [-1.0, -0.5, -1.0], itertools.chain([2], itertools.count(1)), itertools.repeat(None))
    assert list(result) == [{7: Logprob(-1.0, 2), 3: Logprob(-0.5, 1)}]
    assert result.token_ids == [7, 3, 7]


def test_flat_logprobs_can_only_be_appended_to() -> None:
    result = flat([{1: Logprob(-1.0)}])
    with pytest.raises(TypeError, match="appended"):
        result[0] = {}
    with pytest.raises(TypeError, match="appended"):
        del result[0]
    with pytest.raises(TypeError, match="appended"):
        result.insert(0, {})
    with pytest.raises(IndexError):
        result[1]
    assert list(result) == [{1: Logprob(-1.0)}]
