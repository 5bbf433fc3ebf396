"""Stateless random numbers: one uniform number for each token of each row.

The number depends on the row's key and on the token's position alone, so a row draws the same tokens whatever shares
its batch, after preemption, and on every device. The generator is Philox4x32-10, counter-based: Salmon, Moraes, Dror
and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Keys come from `taco.random_keys`.
"""

from __future__ import annotations

import numpy as np

from taco.kernels import native
from taco.kernels.dispatch import op

_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10.

    Args:
        counter: uint32 [4, N].
        key: uint32 [2, N].

    Returns:
        uint32 [4, N].
    """
    # Words 0 and 2 of the counter are multiplied; their products then change places.
    even, odd = counter[::2].astype(np.uint64), counter[1::2].astype(np.uint64)
    key = key.astype(np.uint64)
    for _ in range(_ROUNDS):
        product = even * _MULTIPLIERS
        even = (product[::-1] >> _32) ^ odd ^ key
        odd = product[::-1] & _LOW
        key = (key + _KEY_STEPS) & _LOW
    return np.stack((even[0], odd[0], even[1], odd[1])).astype(np.uint32)


@op
def uniform(seeds: np.ndarray, positions: np.ndarray, stream: int = 0) -> np.ndarray:
    """The random numbers of N tokens.

    Args:
        seeds: uint64 [N], the keys of their rows.
        positions: integers [N] >= 0: how many tokens, prompt and output, stand before each token in its row.
        stream: another one gives other numbers, independent of those.

    Returns:
        float64 [N] in [0, 1), multiples of 2**-53.
    """
    seeds = np.asarray(seeds, np.uint64)
    positions = np.asarray(positions).astype(np.uint64)
    zeros, streams = np.zeros_like(positions), np.full_like(positions, stream)
    words = philox4x32(
        np.stack((positions & _LOW, positions >> _32, streams, zeros)), np.stack((seeds & _LOW, seeds >> _32))
    ).astype(np.uint64)
    return ((words[0] << _32 | words[1]) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@uniform.candidate("native")
def _uniform_native(seeds: np.ndarray, positions: np.ndarray, stream: int = 0) -> np.ndarray:
    library = native.library()
    if library is None:
        return NotImplemented
    seeds = np.ascontiguousarray(seeds, np.uint64)
    positions = np.ascontiguousarray(positions, np.int64)
    found = np.empty(len(seeds))
    library.taco_uniform(seeds.ctypes.data, positions.ctypes.data, stream, len(seeds), found.ctypes.data)
    return found
