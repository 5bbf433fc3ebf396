"""Stateless random numbers: one uniform number for each token of each row.

The number depends on the row's key and on the token's position alone, so a row draws the same tokens whatever shares
its batch, after preemption, and on every device. Keys come from `taco.random_keys`.
"""

from __future__ import annotations

import numpy as np

from taco.kernels import native
from taco.kernels.dispatch import op
from taco.philox import philox4x32

_MASK = 0xFFFFFFFF


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
    seeds, positions = np.asarray(seeds, np.uint64), np.asarray(positions, np.int64)
    key = [word.astype(np.int64) for word in (seeds & np.uint64(_MASK), seeds >> np.uint64(32))]
    high, low, _, _ = philox4x32((positions & _MASK, positions >> 32, stream, 0), key)
    return (high << 21 | low >> 11) * 2.0**-53


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
