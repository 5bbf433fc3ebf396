"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and a sliding window on some layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from taco.layers.decoder import DecoderLayerConfig
from taco.models.base import sliding_window
from taco.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    bias_settings = ()

    def layer_config(self, config: Any, layer_idx: int) -> DecoderLayerConfig:
        return replace(
            super().layer_config(config, layer_idx),
            qkv_bias=True,
            sliding_window=sliding_window(config, layer_idx),
        )
