"""Phi-3 and Phi-3.5: Llama with fused projections in the checkpoint, LongRoPE and a sliding window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from taco.layers.decoder import DecoderLayerConfig
from taco.layers.rotary import RotaryEmbedding
from taco.models.base import sliding_window
from taco.models.llama import LlamaForCausalLM


class Phi3ForCausalLM(LlamaForCausalLM):
    bias_settings = ()

    def layer_config(self, config: Any, layer_idx: int) -> DecoderLayerConfig:
        return replace(
            super().layer_config(config, layer_idx),
            sliding_window=sliding_window(config, layer_idx),
            fused_checkpoint=True,
        )

    def make_rotaries(self, config: Any) -> list[RotaryEmbedding]:
        return [RotaryEmbedding(config, self.head_dim, partial=True)] * self.num_layers
