"""Normalisation layers. Called with a residual, they add it first and return (normalised, sum)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from taco.kernels.norm import layer_norm, rms_norm
from taco.layers.base import DeclareWeight, Layer, weight_parameter


class RMSNorm(Layer):
    """Root mean square normalisation; `name` is its checkpoint name without ".weight".

    Args:
        plus_one: the factor is 1 + weight, applied in float32 (Gemma). The checkpoint holds the difference from 1
            because bfloat16 resolves it better, so the sum is float32 too.
    """

    def __init__(self, size: int, name: str, eps: float, *, plus_one: bool = False) -> None:
        super().__init__()
        self.size = size
        self.name = name
        self.eps = eps
        self.plus_one = plus_one
        self.weight = weight_parameter(size)

    def declare_weights(self, declare: DeclareWeight) -> None:
        declare(f"{self.name}.weight", (self.size,), "weight")

    def finalize(self) -> None:
        if self.plus_one:
            self.weight = nn.Parameter(self.weight.float() + 1, requires_grad=False)

    def reopen(self) -> None:
        if self.plus_one:
            self.weight = nn.Parameter(self.weight - 1, requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return rms_norm(x, self.weight, self.eps, residual)


class QKNorm(Layer):
    """RMS normalisation of each query head with one weight and of each key head with another, in one call.

    Args:
        query_name, key_name: checkpoint names without ".weight".
        plus_one: as for `RMSNorm`.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        query_name: str,
        key_name: str,
        eps: float,
        *,
        plus_one: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.query_name, self.key_name = query_name, key_name
        self.eps = eps
        self.plus_one = plus_one
        self.query = weight_parameter(head_dim)
        self.key = weight_parameter(head_dim)

    def declare_weights(self, declare: DeclareWeight) -> None:
        declare(f"{self.query_name}.weight", (self.head_dim,), "query")
        declare(f"{self.key_name}.weight", (self.head_dim,), "key")

    def finalize(self) -> None:
        weight = torch.cat([self.query.expand(self.num_heads, -1), self.key.expand(self.num_kv_heads, -1)])
        self.weight = nn.Parameter(weight.float() + 1 if self.plus_one else weight, requires_grad=False)
        del self.query, self.key

    def reopen(self) -> None:
        # In float32 adding 1 again gives exactly what was there.
        weight = self.weight - 1 if self.plus_one else self.weight
        self.query = nn.Parameter(weight[0].clone(), requires_grad=False)
        self.key = nn.Parameter(weight[self.num_heads].clone(), requires_grad=False)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[T, num_heads + num_kv_heads, head_dim] -> the same shape, contiguous."""
        return rms_norm(heads, self.weight, self.eps)


class LayerNorm(Layer):
    """Layer normalisation; `name` is its checkpoint name without ".weight" or ".bias".

    Args:
        affine: whether it has a weight and a bias.
    """

    def __init__(self, size: int, name: str, eps: float, *, affine: bool = True) -> None:
        super().__init__()
        self.size = size
        self.name = name
        self.eps = eps
        self.weight = weight_parameter(size) if affine else None
        self.bias = weight_parameter(size) if affine else None

    def declare_weights(self, declare: DeclareWeight) -> None:
        if self.weight is not None:
            declare(f"{self.name}.weight", (self.size,), "weight")
            declare(f"{self.name}.bias", (self.size,), "bias")

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return layer_norm(x, self.weight, self.bias, self.eps, residual)
