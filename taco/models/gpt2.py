"""GPT-2: learned positions, layer norms, one fused projection whose weight the checkpoint holds transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from taco.kernels.metadata import AttentionMetadata
from taco.layers.attention import Attention, SelfAttention
from taco.layers.decoder import MLP, LayerNormDecoderLayer
from taco.layers.embedding import Embedding, LMHead
from taco.layers.linear import Linear
from taco.layers.norm import LayerNorm
from taco.models.base import CausalLM, KVCaches, require_causal, require_settings


class GPT2LMHeadModel(CausalLM):
    name_prefixes = ("transformer.", "")

    def __init__(self, config: Any) -> None:
        super().__init__()
        require_settings(config, add_cross_attention=False)
        require_causal(config)
        self.num_layers = config.n_layer
        self.num_kv_heads = config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.vocab_size = config.vocab_size
        self.hidden_size = config.n_embd
        self.max_position = config.n_positions
        # Causal masks, which old checkpoints carry along.
        self.ignored_weights = ("*.attn.bias", "*.attn.masked_bias")
        if config.tie_word_embeddings:
            self.ignored_weights += ("lm_head.weight",)

        self.embedding = Embedding(config.vocab_size, config.n_embd, "transformer.wte")
        self.position_embedding = Embedding(config.n_positions, config.n_embd, "transformer.wpe")
        self.layers = nn.ModuleList(self._layer(config, layer_idx) for layer_idx in range(self.num_layers))
        self.norm = LayerNorm(config.n_embd, "transformer.ln_f", config.layer_norm_epsilon)
        self.head = LMHead(
            config.vocab_size, config.n_embd, "lm_head", tied=self.embedding if config.tie_word_embeddings else None
        )

    def _layer(self, config: Any, layer_idx: int) -> LayerNormDecoderLayer:
        size, name, eps = config.n_embd, f"transformer.h.{layer_idx}", config.layer_norm_epsilon
        inner_size = 4 * size if config.n_inner is None else config.n_inner
        scale = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer_idx + 1

        def linear(in_features: int, out_features: int, linear_name: str) -> Linear:
            return Linear(in_features, out_features, f"{name}.{linear_name}", bias=True, transposed=True)

        return LayerNormDecoderLayer(
            LayerNorm(size, f"{name}.ln_1", eps),
            SelfAttention(
                Attention(layer_idx, config.n_head, config.n_head, self.head_dim, scale),
                linear(size, 3 * size, "attn.c_attn"),
                linear(size, size, "attn.c_proj"),
            ),
            LayerNorm(size, f"{name}.ln_2", eps),
            MLP(
                linear(size, inner_size, "mlp.c_fc"),
                linear(inner_size, size, "mlp.c_proj"),
                config.activation_function,
            ),
            pre_norm=True,
        )

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, kv_caches: KVCaches, meta: AttentionMetadata
    ) -> torch.Tensor:
        x, residual = self.embedding(input_ids) + self.position_embedding(positions), None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x, residual = layer(x, residual, positions, kv_cache, meta)
        x, _ = self.norm(x, residual)
        return x

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)
