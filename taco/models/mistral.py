"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from taco.layers.decoder import DecoderLayerConfig
from taco.models.base import sliding_window
from taco.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    bias_settings = ()

    def layer_config(self, config: Any, layer_idx: int) -> DecoderLayerConfig:
        return replace(super().layer_config(config, layer_idx), sliding_window=sliding_window(config, layer_idx))
