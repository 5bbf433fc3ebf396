"""OPT: learned positions, layer norms before the blocks or (350M) after them, embeddings narrower than the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from taco.kernels.metadata import AttentionMetadata
from taco.layers.attention import Attention, SelfAttention
from taco.layers.decoder import MLP, LayerNormDecoderLayer
from taco.layers.embedding import Embedding, LMHead
from taco.layers.linear import Linear, MergedLinear
from taco.layers.norm import LayerNorm
from taco.models.base import CausalLM, KVCaches, require_causal

# The first rows of the position table belong to padding.
_FIRST_POSITION = 2
_EPS = 1e-5


class OPTForCausalLM(CausalLM):
    name_prefixes = ("model.decoder.", "decoder.", "")

    def __init__(self, config: Any) -> None:
        super().__init__()
        require_causal(config)
        size, embedding_size = config.hidden_size, config.word_embed_proj_dim
        self.num_layers = config.num_hidden_layers
        self.num_kv_heads = config.num_attention_heads
        self.head_dim = size // config.num_attention_heads
        self.vocab_size = config.vocab_size
        self.hidden_size = size
        self.num_features = embedding_size
        self.max_position = config.max_position_embeddings
        self.ignored_weights = ("*decoder.version",)
        if config.tie_word_embeddings:
            self.ignored_weights += ("lm_head.weight",)

        name = "model.decoder"
        self.embedding = Embedding(config.vocab_size, embedding_size, f"{name}.embed_tokens")
        self.position_embedding = Embedding(
            config.max_position_embeddings + _FIRST_POSITION, size, f"{name}.embed_positions", first=_FIRST_POSITION
        )
        self.project_in = self.project_out = None
        if embedding_size != size:
            self.project_in = Linear(embedding_size, size, f"{name}.project_in", bias=False)
            self.project_out = Linear(size, embedding_size, f"{name}.project_out", bias=False)
        self.layers = nn.ModuleList(self._layer(config, layer_idx) for layer_idx in range(self.num_layers))
        self.norm = None
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            self.norm = LayerNorm(size, f"{name}.final_layer_norm", _EPS, affine=config.layer_norm_elementwise_affine)
        self.head = LMHead(
            config.vocab_size, embedding_size, "lm_head", tied=self.embedding if config.tie_word_embeddings else None
        )

    def _layer(self, config: Any, layer_idx: int) -> LayerNormDecoderLayer:
        size, name = config.hidden_size, f"model.decoder.layers.{layer_idx}"
        bias, affine = config.enable_bias, config.layer_norm_elementwise_affine
        return LayerNormDecoderLayer(
            LayerNorm(size, f"{name}.self_attn_layer_norm", _EPS, affine=affine),
            SelfAttention(
                Attention(layer_idx, self.num_kv_heads, self.num_kv_heads, self.head_dim, self.head_dim**-0.5),
                MergedLinear(size, [(f"{name}.self_attn.{part}_proj", size) for part in "qkv"], bias=bias),
                Linear(size, size, f"{name}.self_attn.out_proj", bias=bias),
            ),
            LayerNorm(size, f"{name}.final_layer_norm", _EPS, affine=affine),
            MLP(
                Linear(size, config.ffn_dim, f"{name}.fc1", bias=bias),
                Linear(config.ffn_dim, size, f"{name}.fc2", bias=bias),
                config.activation_function,
            ),
            pre_norm=config.do_layer_norm_before,
        )

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, kv_caches: KVCaches, meta: AttentionMetadata
    ) -> torch.Tensor:
        x, residual = self.embedding(input_ids), None
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.position_embedding(positions)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x, residual = layer(x, residual, positions, kv_cache, meta)
        if self.norm is not None:
            x, _ = self.norm(x, residual)
        elif residual is not None:
            x = x + residual
        return x

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.project_out is None else self.project_out(hidden)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(hidden))
