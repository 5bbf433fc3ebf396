"""Attention over the paged KV cache, and the block of a decoder layer around it."""

from __future__ import annotations

import torch

from taco.kernels.attention import paged_attention, write_kv
from taco.kernels.metadata import AttentionMetadata
from taco.layers.base import Module
from taco.layers.linear import Linear, MergedLinear
from taco.layers.norm import QKNorm
from taco.layers.rotary import RotaryEmbedding


class Attention(Module):
    """Caches keys and values of this step's tokens and attends to all that is cached of their rows.

    Args:
        layer_idx: index of the layer whose cache it uses.
        scale: factor on the dot products.
        sliding_window: number of keys that a query sees, its own included; None for all.
    """

    def __init__(
        self,
        layer_idx: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = scale
        self.sliding_window = sliding_window

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """query [T, num_heads, head_dim], key and value [T, num_kv_heads, head_dim] -> the shape of query."""
        key_cache, value_cache = kv_cache
        write_kv(key, value, key_cache, value_cache, meta)
        return paged_attention(query, key_cache, value_cache, meta, self.scale, self.sliding_window)


class SelfAttention(Module):
    """Projection to queries, keys and values; their norm and rotation, if any; attention; output projection.

    Args:
        qkv: to all query heads, then all key heads, then all value heads.
    """

    def __init__(
        self,
        attention: Attention,
        qkv: MergedLinear,
        output: Linear,
        *,
        qk_norm: QKNorm | None = None,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.qkv = qkv
        self.qk_norm = qk_norm
        self.rotary = rotary
        self.output = output
        self.num_rotary_heads = attention.num_heads + attention.num_kv_heads
        self.sizes = [attention.num_heads, attention.num_kv_heads, attention.num_kv_heads]

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        num_tokens = x.shape[0]
        heads = self.qkv(x).view(num_tokens, -1, self.attention.head_dim)  # [T, H + 2 KVH, D]
        query, key, value = torch.split_with_sizes(heads, self.sizes, 1)
        if self.qk_norm is not None:
            qk = self.qk_norm(heads[:, : self.num_rotary_heads])
            query, key = torch.split_with_sizes(qk, self.sizes[:2], 1)
        elif self.rotary is not None:
            qk = heads[:, : self.num_rotary_heads]
        if self.rotary is not None:
            self.rotary(qk, positions, meta)
        out = self.attention(query, key, value, kv_cache, meta)
        return self.output(out.reshape(num_tokens, -1))
