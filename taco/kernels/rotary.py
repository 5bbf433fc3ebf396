"""Rotary position embedding."""

from __future__ import annotations

import torch

from taco.kernels.dispatch import op


@op
def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates the heads of queries and keys by the angles of their positions, in place (Su et al., arXiv:2104.09864).

    Dimension i < R/2 of a head forms a pair with dimension i + R/2 (the order of GPT-NeoX); dimensions from R on stay.

    Args:
        x: [T, N, D]; usually a view of the query and key heads within the fused projection.
        cos: [T, 1, R], cosines of the angles of all pairs, twice.
        sin: [T, 1, R], the negated sines of the angles of all pairs, then the sines.
    """
    size = cos.shape[-1]
    part = x if size == x.shape[-1] else x[..., :size]
    partner = part.roll(size // 2, -1)
    part.mul_(cos).addcmul_(partner, sin)
