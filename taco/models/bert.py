"""BERT: learned positions and token types, layers with the norms after the additions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from taco.kernels.metadata import AttentionMetadata
from taco.layers.base import Module
from taco.layers.decoder import MLP
from taco.layers.embedding import Embedding
from taco.layers.encoder import EncoderLayer, EncoderSelfAttention
from taco.layers.linear import Linear, MergedLinear
from taco.layers.norm import LayerNorm
from taco.models.base import KVCaches, require_settings
from taco.models.pooling import EncoderModel, is_tokenwise


class BertClassifier(Module):
    """classifier(tanh(dense(x))) with these checkpoint names."""

    def __init__(self, size: int, num_labels: int, dense: str, classifier: str) -> None:
        super().__init__()
        self.dense = Linear(size, size, dense, bias=True)
        self.classifier = Linear(size, num_labels, classifier, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.dense(x)))


class BertForPooling(EncoderModel):
    prefix: ClassVar[str] = "bert"
    name_prefixes = ("bert.", "")
    takes_token_types = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        require_settings(config, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
        size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.hidden_size = self.num_logits = size
        self.first_position = self.find_first_position(config)
        self.max_position = config.max_position_embeddings - self.first_position
        # Numbers that old checkpoints carry along, and heads that are not used.
        self.ignored_weights = ("*embeddings.position_ids", "*pooler.dense.*", "classifier.*", "cls.*", "lm_head.*")

        name = f"{self.prefix}.embeddings"
        self.embedding = Embedding(config.vocab_size, size, f"{name}.word_embeddings")
        self.position_embedding = Embedding(
            config.max_position_embeddings, size, f"{name}.position_embeddings", first=self.first_position
        )
        self.token_type_embedding = Embedding(config.type_vocab_size, size, f"{name}.token_type_embeddings")
        self.norm = LayerNorm(size, f"{name}.LayerNorm", config.layer_norm_eps)
        self.layers = nn.ModuleList(
            self.make_layer(config, f"{self.prefix}.encoder.layer.{index}") for index in range(config.num_hidden_layers)
        )
        self.classifier: Module | None = None
        if self.use == "classify":
            self.classifier = self.make_classifier(config)
            self.num_logits = config.num_labels

    def find_first_position(self, config: Any) -> int:
        """Row of the position table that belongs to the first token."""
        return 0

    def make_classifier(self, config: Any) -> Module:
        """What makes logits of the first token's hidden state, or of all."""
        if is_tokenwise(config):
            return Linear(config.hidden_size, config.num_labels, "classifier", bias=True)
        return BertClassifier(config.hidden_size, config.num_labels, f"{self.prefix}.pooler.dense", "classifier")

    def make_layer(self, config: Any, name: str) -> EncoderLayer:
        size, eps = config.hidden_size, config.layer_norm_eps
        attention_name = f"{name}.attention"
        return EncoderLayer(
            LayerNorm(size, f"{attention_name}.output.LayerNorm", eps),
            EncoderSelfAttention(
                config.num_attention_heads,
                size // config.num_attention_heads,
                MergedLinear(
                    size, [(f"{attention_name}.self.{part}", size) for part in ("query", "key", "value")], bias=True
                ),
                Linear(size, size, f"{attention_name}.output.dense", bias=True),
            ),
            LayerNorm(size, f"{name}.output.LayerNorm", eps),
            MLP(
                Linear(size, config.intermediate_size, f"{name}.intermediate.dense", bias=True),
                Linear(config.intermediate_size, size, f"{name}.output.dense", bias=True),
                config.hidden_act,
            ),
            pre_norm=False,
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: KVCaches,
        meta: AttentionMetadata,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        table = self.token_type_embedding
        types = table.weight[0] if token_type_ids is None else table(token_type_ids)
        x = self.norm(self.embedding(input_ids) + types + self.position_embedding(positions))
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, positions, meta)
        return x

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden if self.classifier is None else self.classifier(hidden)).float()
