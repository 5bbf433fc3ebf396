"""ModernBERT: rotary positions, local and global attention, gated MLPs, norms before the blocks and without biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from taco.kernels.metadata import AttentionMetadata
from taco.layers.activation import get_activation
from taco.layers.base import DeclareWeight, Module
from taco.layers.decoder import GatedMLP
from taco.layers.embedding import Embedding
from taco.layers.encoder import EncoderLayer, EncoderSelfAttention
from taco.layers.linear import Linear
from taco.layers.norm import LayerNorm
from taco.layers.rotary import RotaryEmbedding
from taco.models.base import KVCaches
from taco.models.pooling import EncoderModel


class ModernBertNorm(LayerNorm):
    """Layer normalisation, whose bias may be missing."""

    def __init__(self, config: Any, name: str) -> None:
        super().__init__(config.hidden_size, name, config.norm_eps)
        if not config.norm_bias:
            self.bias = None

    def declare_weights(self, declare: DeclareWeight) -> None:
        declare(f"{self.name}.weight", (self.size,), "weight")
        if self.bias is not None:
            declare(f"{self.name}.bias", (self.size,), "bias")


class ModernBertClassifier(Module):
    """classifier(norm(activation(dense(x))))."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.dense = Linear(size, size, "head.dense", bias=config.classifier_bias)
        self.activation = get_activation(config.classifier_activation)
        self.norm = ModernBertNorm(config, "head.norm")
        self.classifier = Linear(size, config.num_labels, "classifier", bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.norm(self.activation(self.dense(x))))


class ModernBertForPooling(EncoderModel):
    def __init__(self, config: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.hidden_size = self.num_logits = size
        self.max_position = config.max_position_embeddings
        self.ignored_weights = ("head.*", "classifier.*", "decoder.*")

        self.embedding = Embedding(config.vocab_size, size, "model.embeddings.tok_embeddings")
        self.norm = ModernBertNorm(config, "model.embeddings.norm")
        head_dim = size // config.num_attention_heads
        rotaries = {
            layer_type: RotaryEmbedding(config, head_dim, layer_type=layer_type)
            for layer_type in sorted(set(config.layer_types))
        }
        self.layers = nn.ModuleList(
            self._layer(config, index, layer_type, rotaries[layer_type])
            for index, layer_type in enumerate(config.layer_types)
        )
        self.final_norm = ModernBertNorm(config, "model.final_norm")
        self.classifier: Module | None = None
        if self.use == "classify":
            self.classifier = ModernBertClassifier(config)
            self.num_logits = config.num_labels

    def _layer(self, config: Any, index: int, layer_type: str, rotary: RotaryEmbedding) -> EncoderLayer:
        size, inner_size, name = config.hidden_size, config.intermediate_size, f"model.layers.{index}"
        return EncoderLayer(
            ModernBertNorm(config, f"{name}.attn_norm") if index else None,
            EncoderSelfAttention(
                config.num_attention_heads,
                size // config.num_attention_heads,
                Linear(size, 3 * size, f"{name}.attn.Wqkv", bias=config.attention_bias),
                Linear(size, size, f"{name}.attn.Wo", bias=config.attention_bias),
                rotary=rotary,
                window=config.local_attention // 2 if layer_type == "sliding_attention" else None,
            ),
            ModernBertNorm(config, f"{name}.mlp_norm"),
            GatedMLP(
                Linear(size, 2 * inner_size, f"{name}.mlp.Wi", bias=config.mlp_bias),
                Linear(inner_size, size, f"{name}.mlp.Wo", bias=config.mlp_bias),
                config.hidden_activation,
            ),
            pre_norm=True,
        )

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, kv_caches: KVCaches, meta: AttentionMetadata
    ) -> torch.Tensor:
        x, residual = self.norm(self.embedding(input_ids)), None
        for layer in self.layers:
            x, residual = layer(x, residual, positions, meta)
        x, _ = self.final_norm(x, residual)
        return x

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden if self.classifier is None else self.classifier(hidden)).float()
