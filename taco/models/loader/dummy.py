"""Random weights for `load_format="dummy"`: to measure and to test without a checkpoint."""

from __future__ import annotations

import zlib

import torch

# Elements of the random block that all weights are taken from. It is a prime number, so that no two rows of a weight
# are the same: the logits of two tokens would tie.
BLOCK_SIZE = 1048573
STANDARD_DEVIATION = 0.02


def dummy_block(*, device: torch.device | str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The random block [BLOCK_SIZE], normal around 0; its values do not depend on the device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    block = torch.randn(BLOCK_SIZE, generator=generator, dtype=torch.float32) * STANDARD_DEVIATION
    return block.to(device=device, dtype=dtype)


def fill_dummy(param: torch.Tensor, name: str, block: torch.Tensor) -> None:
    """Fill a contiguous parameter with the block, again and again, from a place in it that depends on its name.

    The weights of norms (the vectors called "weight") are around 1, all others around 0.
    """
    flat = param.view(-1)
    rolled = block.roll(zlib.crc32(name.encode()) % BLOCK_SIZE)
    for start in range(0, flat.numel(), BLOCK_SIZE):
        piece = flat[start : start + BLOCK_SIZE]
        piece.copy_(rolled[: piece.numel()])
    if param.dim() == 1 and name.endswith("weight"):
        flat.add_(1)
