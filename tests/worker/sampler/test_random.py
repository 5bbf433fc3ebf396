from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.random_keys import mix_seed
from taco.worker.sampler.random import philox4x32, uniform

# Counter, key, result: the known answers that come with the generator's reference implementation (Random123).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([[int(word, 16)] for word in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, result: str) -> None:
    assert np.array_equal(philox4x32(words(counter), words(key)), words(result))


def test_philox_computes_columns_independently() -> None:
    counters = np.hstack([words(counter) for counter, _, _ in KNOWN_ANSWERS])
    keys = np.hstack([words(key) for _, key, _ in KNOWN_ANSWERS])
    assert np.array_equal(philox4x32(counters, keys), np.hstack([words(result) for _, _, result in KNOWN_ANSWERS]))


def test_uniform_is_the_first_53_bits_of_philox_at_the_position() -> None:
    seed, position = 0x299F31D0A4093822, 5
    first, second = philox4x32(words("5 0 0 0"), words("a4093822 299f31d0"))[:2, 0].tolist()
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
