"""Gated activations of fused gate and up projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from taco.kernels.dispatch import op


@op
def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): x [..., 2 I], gate before up -> silu(gate) * up [..., I]."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


@op
def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """GeGLU: x [..., 2 I], gate before up -> gelu(gate) * up [..., I]."""
    gate, up = x.chunk(2, -1)
    return F.gelu(gate).mul_(up)


@op
def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """GeGLU with the tanh approximation: x [..., 2 I], gate before up -> gelu(gate) * up [..., I]."""
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh").mul_(up)
