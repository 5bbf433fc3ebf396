"""Linear layers: one product, filled from one or several tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from taco.kernels.linear import linear, pack_weight, unpack_weight
from taco.layers.base import DeclareWeight, Layer, as_parameter, weight_parameter


class MergedLinear(Layer):
    """Several linear layers of the same input as a single product; their outputs stand side by side.

    Args:
        in_features: K.
        parts: checkpoint name (without ".weight" or ".bias") and number of outputs of each layer, in order.
        transposed: the checkpoint holds the weights as [K, N] (the Conv1D of GPT-2).
    """

    def __init__(
        self, in_features: int, parts: Sequence[tuple[str, int]], *, bias: bool, transposed: bool = False
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = tuple(parts)
        self.out_features = sum(size for _, size in parts)
        self.transposed = transposed
        self.weight = weight_parameter(self.out_features, in_features)
        self.bias = weight_parameter(self.out_features) if bias else None

    def declare_weights(self, declare: DeclareWeight) -> None:
        offset = 0
        for name, size in self.parts:
            shape = (self.in_features, size) if self.transposed else (size, self.in_features)
            declare(f"{name}.weight", shape, "weight", dim=0, offset=offset, transpose=self.transposed)
            if self.bias is not None:
                declare(f"{name}.bias", (size,), "bias", dim=0, offset=offset)
            offset += size

    def finalize(self) -> None:
        # The plain weight is let go of here, one layer at a time, so that no two copies of the model are in memory.
        self.weight = as_parameter(pack_weight(self.weight))

    def reopen(self) -> None:
        self.weight = as_parameter(unpack_weight(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] -> [T, out_features]."""
        return linear(x, self.weight, self.bias)


class Linear(MergedLinear):
    """One linear layer; `name` is its checkpoint name without ".weight" or ".bias"."""

    def __init__(self, in_features: int, out_features: int, name: str, *, bias: bool, transposed: bool = False) -> None:
        super().__init__(in_features, [(name, out_features)], bias=bias, transposed=transposed)
