from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.philox import philox4x32
from taco.random_keys import mix_seed
from taco.worker.sampler.random import uniform


def test_uniform_is_the_first_53_bits_of_philox_at_the_position() -> None:
    seed, position = 0x299F31D0A4093822, 5
    first, second, _, _ = philox4x32((5, 0, 0, 0), (0xA4093822, 0x299F31D0))
    expected = ((first << 32 | second) >> 11) / 2**53
    assert uniform(np.array([seed], np.uint64), np.array([position]))[0] == expected


@given(
    pairs=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**62)), max_size=20),
    stream=st.integers(0, 2**32 - 1),
)
def test_the_native_generator_is_the_same(pairs: list[tuple[int, int]], stream: int) -> None:
    seeds = np.array([seed for seed, _ in pairs], np.uint64)
    positions = np.array([position for _, position in pairs], np.int64)
    with uniform.forced("reference"):
        expected = uniform(seeds, positions, stream)
    assert np.array_equal(uniform(seeds, positions, stream), expected)
    wide = np.repeat(seeds, 2)[::2], np.repeat(positions, 2)[::2]  # every other entry of memory
    assert np.array_equal(uniform(*wide, stream), expected)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40)), min_size=1, max_size=20))
def test_uniform_depends_on_seed_and_position_alone(pairs: list[tuple[int, int]]) -> None:
    seeds = np.array([seed for seed, _ in pairs], np.uint64)
    positions = np.array([position for _, position in pairs])
    together = uniform(seeds, positions)
    assert ((together >= 0) & (together < 1)).all()
    for index in range(len(pairs)):
        assert uniform(seeds[index : index + 1], positions[index : index + 1])[0] == together[index]


def test_uniform_uses_all_bits_of_seed_and_position() -> None:
    seeds = np.array([0] + [1 << bit for bit in range(64)], np.uint64)
    assert len(set(uniform(seeds, np.zeros(65, int)).tolist())) == 65
    positions = np.array([0] + [1 << bit for bit in range(62)])
    assert len(set(uniform(np.zeros(63, np.uint64), positions).tolist())) == 63


@pytest.mark.parametrize("axis", ["positions", "samples"])
def test_uniform_is_spread_evenly_and_without_order(axis: str) -> None:
    count = 20_000
    if axis == "positions":
        numbers = uniform(np.full(count, mix_seed(7, 0), np.uint64), np.arange(count))
    else:
        numbers = uniform(np.array([mix_seed(7, index) for index in range(count)], np.uint64), np.full(count, 3))
    hits = np.bincount((numbers * 100).astype(int), minlength=100)
    chi_square = ((hits - count / 100) ** 2 / (count / 100)).sum()
    assert 55 < chi_square < 155  # 99 degrees of freedom: about 4 standard deviations
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 4 / np.sqrt(count)
