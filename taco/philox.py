"""The generator of random numbers: Philox4x32-10, which has no state.

It makes four random words of a counter and a key (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011). Words are 32 bits wide and held in integers of Python, int64 arrays of numpy or tensors of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 on words that broadcast.

    Args:
        counter: four words.
        key: two words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products overflow int64, which keeps their low 64 bits; the mask undoes the sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> 32) & _MASK ^ c1 ^ k0, product1 & _MASK
        c2, c3 = (product0 >> 32) & _MASK ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3
