"""Products with weight matrices.

On x86 CPUs the products of oneDNN on weights in its own blocked layout are 1.1 to 3 times as fast as `F.linear`, most
so for few rows. They also sum in the same order however many rows share the call (`F.linear` in float32 does not), so
that a row's result does not depend on its batch.
"""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F

from taco.kernels.dispatch import op


@functools.cache
def _onednn_supports(dtype: torch.dtype) -> bool:
    """Whether torch brings oneDNN with the operators used here, and its products of this dtype are fast."""
    ops = torch.ops.mkldnn
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if not (hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")):
        return False
    # float16 has no fast product on most CPUs, in oneDNN or elsewhere.
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight [N, K] in the layout that makes `linear` fastest on its device.

    That is a packed copy (`is_mkldnn`), which only `linear` and `to_dense()` understand, or `weight` itself where no
    other layout is better.
    """
    if weight.device.type == "cpu" and not weight.is_mkldnn and _onednn_supports(weight.dtype):
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return weight


@op
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] times the transpose of `weight` [N, K], plus `bias` [N]: [..., N], all of one dtype.

    Args:
        weight: plain, or packed by `pack_weight`.
    """
    return F.linear(x, weight.to_dense() if weight.is_mkldnn else weight, bias)


@linear.candidate("onednn")
def _linear_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # In float32 oneDNN is the faster library for plain weights as well; in bfloat16 `F.linear` calls it anyway.
    if weight.is_mkldnn or (
        weight.dtype == torch.float32 and weight.device.type == "cpu" and _onednn_supports(torch.float32)
    ):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return NotImplemented
