"""Normalisation of activations, with the preceding residual addition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from taco.kernels.dispatch import op


@op
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root mean square normalisation over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: [..., D].
        weight: [..., D], broadcast against `x`. Its dtype is the one in which it is multiplied: that of `x` (Llama),
            or float32 for a single rounding at the end (Gemma).
        residual: added to `x` first.

    Returns:
        The normalised tensor, in the dtype of `x`; with `residual`, a tuple of it and the sum `x + residual`.
    """
    if residual is not None:
        x = x + residual
    scaled = x.float()
    scaled = scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + eps)
    normed = (scaled.to(weight.dtype) * weight).to(x.dtype)
    return normed if residual is None else (normed, x)


@rms_norm.candidate("cpu")
def _rms_norm_cpu(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """On a CPU torch's operator is made of many; a norm without float32 copies of the activations takes fewer."""
    if x.device.type != "cpu" or weight.dtype != x.dtype:
        return NotImplemented
    if residual is not None:
        x = x + residual
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = torch.mul(x, factor, out=torch.empty_like(x)).mul_(weight)
    return normed if residual is None else (normed, x)


@rms_norm.candidate("aten")
def _rms_norm_aten(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One operator of torch (one kernel on CUDA), which rounds where the reference does."""
    if residual is not None:
        x = x + residual
    if weight.dtype == x.dtype:
        normed = torch.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    else:
        normed = torch.rms_norm(x.float(), x.shape[-1:], None, eps).mul_(weight).to(x.dtype)
    return normed if residual is None else (normed, x)


@op
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation of x [..., D] over its last dimension (Ba et al. 2016, arXiv:1607.06450).

    Args:
        weight, bias: [D], or None for none.
        residual: added to `x` first.

    Returns:
        As `rms_norm`.
    """
    if residual is not None:
        x = x + residual
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return normed if residual is None else (normed, x)
