"""Gemma 3 text: four norms a layer, normalised queries and keys, local and global layers with their own rotations."""

from __future__ import annotations

from typing import Any

import torch

from taco.layers.decoder import DecoderLayerConfig
from taco.layers.rotary import RotaryEmbedding
from taco.models.base import DenseCausalLM, require_settings, sliding_window


class Gemma3ForCausalLM(DenseCausalLM):
    def __init__(self, config: Any) -> None:
        require_settings(
            config, attn_logit_softcapping=None, final_logit_softcapping=None, use_bidirectional_attention=False
        )
        super().__init__(config)
        self.embedding_scale = config.hidden_size**0.5

    def layer_config(self, config: Any, layer_idx: int) -> DecoderLayerConfig:
        return DecoderLayerConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            activation=config.hidden_activation,
            eps=config.rms_norm_eps,
            scale=config.query_pre_attn_scalar**-0.5,
            sliding_window=sliding_window(config, layer_idx),
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm=True,
            sandwich_norm=True,
            norm_plus_one=True,
        )

    def make_rotaries(self, config: Any) -> list[RotaryEmbedding]:
        by_type = {
            layer_type: RotaryEmbedding(config, self.head_dim, layer_type=layer_type)
            for layer_type in sorted(set(config.layer_types))
        }
        return [by_type[layer_type] for layer_type in config.layer_types]

    def finalize(self, max_model_len: int | None = None) -> None:
        super().finalize(max_model_len)
        # The model was trained with the factor rounded to the dtype of its weights.
        self.embedding_scale = torch.tensor(self.embedding_scale).to(self.embedding.weight.dtype).item()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids).mul_(self.embedding_scale)
