"""Llama 2, 3, 3.1 and what shares their architecture (SmolLM2, Yi, ...)."""

from __future__ import annotations

from typing import Any, ClassVar

from taco.layers.decoder import DecoderLayerConfig
from taco.models.base import DenseCausalLM


class LlamaForCausalLM(DenseCausalLM):
    """
    Attributes:
        bias_settings: which settings of the configuration say that there are biases; transformers reads no others.
    """

    bias_settings: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias")

    def layer_config(self, config: Any, layer_idx: int) -> DecoderLayerConfig:
        biases = {name: getattr(config, name, False) for name in self.bias_settings}
        return DecoderLayerConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            activation=config.hidden_act,
            eps=config.rms_norm_eps,
            qkv_bias=biases.get("attention_bias", False),
            output_bias=biases.get("attention_bias", False),
            mlp_bias=biases.get("mlp_bias", False),
        )
