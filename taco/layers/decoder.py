"""Decoder layers: the blocks that models are made of.

Between layers travels a pair: what the last block computed, and the residual stream that it is still to be added to
(None before the first layer, where the former is the stream itself). So each addition can happen within the
normalisation that follows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from taco.kernels.dispatch import op
from taco.kernels.metadata import AttentionMetadata
from taco.layers.activation import get_activation
from taco.layers.attention import Attention, SelfAttention
from taco.layers.base import Module
from taco.layers.linear import Linear, MergedLinear
from taco.layers.norm import LayerNorm, QKNorm, RMSNorm
from taco.layers.rotary import RotaryEmbedding


@dataclass(frozen=True)
class DecoderLayerConfig:
    """What distinguishes the dense decoder layers of the Llama family.

    Args:
        activation: of the gate, by its name in configurations.
        eps: of all norms.
        scale: factor on the dot products of attention; by default 1 / sqrt(head_dim).
        sliding_window: number of keys that a query sees, its own included; None for all.
        qk_norm: whether query and key heads are normalised.
        sandwich_norm: whether the outputs of both blocks are normalised before they are added (Gemma).
        norm_plus_one: as `plus_one` of `RMSNorm`.
        fused_checkpoint: whether the checkpoint holds qkv_proj and gate_up_proj instead of their parts.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    eps: float
    scale: float | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norm: bool = False
    norm_plus_one: bool = False
    fused_checkpoint: bool = False


class GatedMLP(Module):
    """down(activation(gate(x)) * up(x)) with gate and up in one product."""

    def __init__(self, gate_up: MergedLinear, down: Linear, activation: str) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = get_activation(activation, gated=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate_up(x)))


class DecoderLayer(Module):
    """Pre-norm attention and gated MLP.

    Args:
        name: checkpoint name of the layer, such as "model.layers.0".
    """

    def __init__(self, layer_idx: int, name: str, config: DecoderLayerConfig, rotary: RotaryEmbedding) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        query_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        attention_name, mlp_name = f"{name}.self_attn", f"{name}.mlp"

        def norm(norm_name: str) -> RMSNorm:
            return RMSNorm(size, f"{name}.{norm_name}", config.eps, plus_one=config.norm_plus_one)

        if config.fused_checkpoint:
            qkv_parts = [(f"{attention_name}.qkv_proj", query_size + 2 * kv_size)]
            gate_up_parts = [(f"{mlp_name}.gate_up_proj", 2 * config.intermediate_size)]
        else:
            qkv_parts = [
                (f"{attention_name}.q_proj", query_size),
                (f"{attention_name}.k_proj", kv_size),
                (f"{attention_name}.v_proj", kv_size),
            ]
            gate_up_parts = [
                (f"{mlp_name}.gate_proj", config.intermediate_size),
                (f"{mlp_name}.up_proj", config.intermediate_size),
            ]
        self.input_norm = norm("input_layernorm")
        self.attention = SelfAttention(
            Attention(
                layer_idx,
                config.num_heads,
                config.num_kv_heads,
                head_dim,
                head_dim**-0.5 if config.scale is None else config.scale,
                config.sliding_window,
            ),
            MergedLinear(size, qkv_parts, bias=config.qkv_bias),
            Linear(query_size, size, f"{attention_name}.o_proj", bias=config.output_bias),
            qk_norm=QKNorm(
                config.num_heads,
                config.num_kv_heads,
                head_dim,
                f"{attention_name}.q_norm",
                f"{attention_name}.k_norm",
                config.eps,
                plus_one=config.norm_plus_one,
            )
            if config.qk_norm
            else None,
            rotary=rotary,
        )
        self.attention_out_norm = norm("post_attention_layernorm") if config.sandwich_norm else None
        self.mlp_norm = norm("pre_feedforward_layernorm" if config.sandwich_norm else "post_attention_layernorm")
        self.mlp = GatedMLP(
            MergedLinear(size, gate_up_parts, bias=config.mlp_bias),
            Linear(config.intermediate_size, size, f"{mlp_name}.down_proj", bias=config.mlp_bias),
            config.activation,
        )
        self.mlp_out_norm = norm("post_feedforward_layernorm") if config.sandwich_norm else None

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        meta: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return decoder_layer(self, x, residual, positions, kv_cache, meta)


@op
def decoder_layer(
    layer: DecoderLayer,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    positions: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    meta: AttentionMetadata,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole `DecoderLayer`, as one operation that a native or captured implementation may replace.

    Args:
        x: [T, hidden_size], output of the block before.
        residual: [T, hidden_size], to which `x` is to be added; None if `x` is the residual stream.
        positions: int64 [T].
        kv_cache: keys and values of this layer.

    Returns:
        The same pair after this layer.
    """
    if residual is None:
        residual = x
        x = layer.input_norm(x)
    else:
        x, residual = layer.input_norm(x, residual)
    x = layer.attention(x, positions, kv_cache, meta)
    if layer.attention_out_norm is not None:
        x = layer.attention_out_norm(x)
    x, residual = layer.mlp_norm(x, residual)
    x = layer.mlp(x)
    if layer.mlp_out_norm is not None:
        x = layer.mlp_out_norm(x)
    return x, residual


class MLP(Module):
    """down(activation(up(x)))."""

    def __init__(self, up: Linear, down: Linear, activation: str) -> None:
        super().__init__()
        self.up = up
        self.down = down
        self.activation = get_activation(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


class LayerNormDecoderLayer(Module):
    """Attention without rotation and a plain MLP, with layer normalisation before each block, or after its addition.

    Args:
        pre_norm: whether the norms come before the blocks.
    """

    def __init__(
        self, attention_norm: LayerNorm, attention: SelfAttention, mlp_norm: LayerNorm, mlp: MLP, *, pre_norm: bool
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.pre_norm = pre_norm

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        meta: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return layer_norm_decoder_layer(self, x, residual, positions, kv_cache, meta)


@op
def layer_norm_decoder_layer(
    layer: LayerNormDecoderLayer,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    positions: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    meta: AttentionMetadata,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A whole `LayerNormDecoderLayer`; arguments and result as for `decoder_layer`.

    With norms after the additions nothing is left to add, so the residual is None throughout.
    """
    if not layer.pre_norm:
        x, _ = layer.attention_norm(layer.attention(x, positions, kv_cache, meta), x)
        x, _ = layer.mlp_norm(layer.mlp(x), x)
        return x, None
    if residual is None:
        residual = x
        x = layer.attention_norm(x)
    else:
        x, residual = layer.attention_norm(x, residual)
    x = layer.attention(x, positions, kv_cache, meta)
    x, residual = layer.mlp_norm(x, residual)
    return layer.mlp(x), residual
