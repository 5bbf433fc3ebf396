"""Qwen3: Llama with normalised queries and keys, and a sliding window on some layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from taco.layers.decoder import DecoderLayerConfig
from taco.models.base import sliding_window
from taco.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    bias_settings = ("attention_bias",)

    def layer_config(self, config: Any, layer_idx: int) -> DecoderLayerConfig:
        return replace(
            super().layer_config(config, layer_idx), qk_norm=True, sliding_window=sliding_window(config, layer_idx)
        )
