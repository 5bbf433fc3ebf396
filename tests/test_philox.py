from __future__ import annotations

import numpy as np
import pytest
import torch

from taco.philox import philox4x32

# Counter, key, result: the known answers that come with the generator's reference implementation (Random123).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, result: str) -> None:
    assert philox4x32(words(counter), words(key)) == tuple(words(result))


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_philox_computes_columns_independently(make) -> None:
    counters, keys, results = (list(zip(*map(words, texts), strict=True)) for texts in zip(*KNOWN_ANSWERS, strict=True))
    found = philox4x32([make(row) for row in counters], [make(row) for row in keys])
    assert [tuple(row.tolist()) for row in found] == results
