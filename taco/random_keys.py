"""Keys of the random numbers that a request draws.

A key is a 64-bit number derived from what identifies the request, never from a generator's state: so a row's tokens do
not depend on its neighbours or on the order of work. The mixing function is SplitMix64's (Steele, Lea and Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014) with the constants of Stafford's variant 13.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, odd: its multiples visit every 64-bit number
_UNSEEDED = 0x7461636F  # keeps the keys of rows without a seed apart from those of rows with one


def _mix(value: int) -> int:
    """A bijection of 64-bit numbers in which every input bit changes about half of the output bits."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix_seed(seed: int, sample_index: int) -> int:
    """The key of one sample of a request.

    Args:
        seed: the request's seed, any integer; taken modulo 2**64.
        sample_index: 0 for the first of the request's `n` samples.

    Returns:
        A number in [0, 2**64), different for the samples of one request.
    """
    return _mix(_mix(seed + _GAMMA) + (sample_index + 1) * _GAMMA)


def row_seed(engine_seed: int, request_index: int) -> int:
    """The seed of a request whose caller gave none.

    Equal prompts then differ, and a program that is run again gets the same samples.

    Args:
        engine_seed: the `seed` argument of `LLM`.
        request_index: number of the request in the life of the `LLM`, from 0.
    """
    return _mix(_mix(engine_seed ^ _UNSEEDED) + (request_index + 1) * _GAMMA)
