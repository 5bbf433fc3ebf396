"""Encoder layers: attention in both directions and an MLP, with layer normalisation before or after each block.

As between decoder layers, a pair travels: what the last block computed, and the residual stream that it is still to be
added to (None where the former is the stream itself).
"""

from __future__ import annotations

import torch

from taco.kernels.dispatch import op
from taco.kernels.encoder_attention import encoder_attention
from taco.kernels.metadata import AttentionMetadata
from taco.layers.base import Module
from taco.layers.linear import Linear, MergedLinear
from taco.layers.norm import LayerNorm
from taco.layers.rotary import RotaryEmbedding


class EncoderSelfAttention(Module):
    """Projection to queries, keys and values; their rotation, if any; attention; output projection.

    Args:
        num_heads: of queries, keys and values alike.
        qkv: to all query heads, then all key heads, then all value heads.
        window: a token sees those at most this many positions before and after it; None for all.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        qkv: MergedLinear,
        output: Linear,
        *,
        rotary: RotaryEmbedding | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = head_dim**-0.5
        self.qkv = qkv
        self.output = output
        self.rotary = rotary
        self.window = window

    def forward(self, x: torch.Tensor, positions: torch.Tensor, meta: AttentionMetadata) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        heads = self.qkv(x).view(len(x), 3 * self.num_heads, self.head_dim)
        if self.rotary is not None:
            self.rotary(heads[:, : 2 * self.num_heads], positions, meta)
        query, key, value = torch.split_with_sizes(heads, [self.num_heads] * 3, 1)
        out = encoder_attention(query, key, value, meta, self.scale, self.window)
        return self.output(out.view(len(x), -1))


class EncoderLayer(Module):
    """Attention and MLP, each in a residual connection with a norm.

    Args:
        attention_norm: None for a first layer whose input is normalised already (with `pre_norm` only).
        mlp: a module [T, hidden_size] -> [T, hidden_size].
        pre_norm: whether the norms come before the blocks, or after the additions (BERT).
    """

    def __init__(
        self,
        attention_norm: LayerNorm | None,
        attention: EncoderSelfAttention,
        mlp_norm: LayerNorm,
        mlp: Module,
        *,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.pre_norm = pre_norm

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor, meta: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return encoder_layer(self, x, residual, positions, meta)


@op
def encoder_layer(
    layer: EncoderLayer,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    positions: torch.Tensor,
    meta: AttentionMetadata,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A whole `EncoderLayer`, as one operation that a native or captured implementation may replace.

    Args:
        x: [T, hidden_size], output of the block before.
        residual: [T, hidden_size], to which `x` is to be added; None if `x` is the residual stream.
        positions: int64 [T].

    Returns:
        The same pair after this layer; with norms after the additions nothing is left to add, so the residual is None.
    """
    if not layer.pre_norm:
        x, _ = layer.attention_norm(layer.attention(x, positions, meta), x)
        x, _ = layer.mlp_norm(layer.mlp(x), x)
        return x, None
    if layer.attention_norm is None:
        assert residual is None
        residual = x
    elif residual is None:
        residual = x
        x = layer.attention_norm(x)
    else:
        x, residual = layer.attention_norm(x, residual)
    x = layer.attention(x, positions, meta)
    x, residual = layer.mlp_norm(x, residual)
    return layer.mlp(x), residual
