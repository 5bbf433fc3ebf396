"""Token and position embeddings, and the projection back to the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from taco.kernels.linear import PackedWeight, linear, pack_weight, packs_natively, unpack_weight
from taco.layers.base import DeclareWeight, Layer, as_parameter, weight_parameter

# The head of a model with tied embeddings is about 1.7 times as fast with a packed table. Lookups can read the tiles of
# the native kernels, but not oneDNN's layout: they need the plain table beside it. That second copy is worth its memory
# while it is small (SmolLM2 in bfloat16: 54 MiB); for a large vocabulary on a small model it would take more than all
# other weights together (Gemma 3 270M: 320 MiB of 512).
MAX_PACKED_COPY_BYTES = 128 << 20


class Embedding(Layer):
    """A table of vectors; `name` is its checkpoint name without ".weight".

    Args:
        first: row of the table that index 0 means.
    """

    def __init__(self, num_rows: int, size: int, name: str, *, first: int = 0) -> None:
        super().__init__()
        self.num_rows, self.size = num_rows, size
        self.name = name
        self.first = first
        self.weight = weight_parameter(num_rows, size)

    def declare_weights(self, declare: DeclareWeight) -> None:
        declare(f"{self.name}.weight", (self.num_rows, self.size), "weight")

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, size]."""
        if self.first:
            indices = indices + self.first
        if isinstance(self.weight, PackedWeight):
            return self.weight.rows(indices)
        return F.embedding(indices, self.weight)


class LMHead(Layer):
    """Projects hidden states to logits over the vocabulary.

    Args:
        name: checkpoint name of its weight, without ".weight".
        tied: the embedding whose table it shares, or None if it has a weight of its own.
    """

    def __init__(self, vocab_size: int, size: int, name: str, *, tied: Embedding | None) -> None:
        super().__init__()
        self.vocab_size, self.size = vocab_size, size
        self.name = name
        self.tied = tied is not None
        # Not a submodule: it is one of the model already.
        self.__dict__["embedding"] = tied
        self.weight = weight_parameter(vocab_size, size) if tied is None else tied.weight

    def declare_weights(self, declare: DeclareWeight) -> None:
        if not self.tied:
            declare(f"{self.name}.weight", (self.vocab_size, self.size), "weight")

    def finalize(self) -> None:
        if self.tied and not packs_natively(self.weight) and self.weight.nbytes > MAX_PACKED_COPY_BYTES:
            return
        self.weight = as_parameter(pack_weight(self.weight))
        if self.tied and isinstance(self.weight, PackedWeight):
            self.embedding.weight = self.weight

    def reopen(self) -> None:
        """Also reopens the embedding that shares the weight."""
        owner = self.embedding if self.tied else self
        self.weight = owner.weight = as_parameter(unpack_weight(owner.weight))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, size] -> float32 [N, vocab_size]. float32 because searches over bfloat16 are slow on CPUs."""
        return linear(hidden, self.weight, None, torch.float32)
