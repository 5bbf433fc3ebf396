"""The configuration of a model in a GGUF file, as the fields of its Hugging Face configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader.gguf_file import GGUFHeader

# Tensors that describe the rotary embedding: they are read here and are no weights of a model.
_LLAMA3_FACTORS = "rope_freqs.weight"
_LONG_FACTORS = "rope_factors_long.weight"
_SHORT_FACTORS = "rope_factors_short.weight"
CONFIG_TENSORS = frozenset({_LLAMA3_FACTORS, _LONG_FACTORS, _SHORT_FACTORS})

# Metadata that every architecture here has (general.architecture as prefix), and the field it is.
_COMMON_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}

# Metadata that changes what a model computes, and the value with which it does not; 0 stands for a value that is left
# out.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.scale": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "expert_count": 0,
}

# Gemma 3 was trained with this base in its sliding-window layers; older converters do not write it.
_GEMMA_LOCAL_ROPE_BASE = 10000.0
# The one Gemma 3 model (27B) whose query scale is not its head size (google/gemma-3-27b-it, config.json).
_GEMMA_27B_LAYERS = 62


def gguf_config_fields(header: GGUFHeader) -> dict[str, Any]:
    """Fields of the configuration, "model_type" included, for `AutoConfig.for_model(**fields)`.

    Raises:
        UnsupportedFeatureError: the architecture, or a variant of it, is not supported.
        TacoValidationError: metadata that is needed is missing.
    """
    if header.architecture not in _ARCHITECTURES:
        raise UnsupportedFeatureError(
            f"{header.path} holds a model of the architecture {header.architecture!r}; GGUF files of these "
            f"architectures can be read: {', '.join(sorted(_ARCHITECTURES))}.",
            parameter="model",
            value=header.path,
        )
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in header.tensors:
            raise TacoValidationError(f"{header.path} has no tensor {name}; it does not hold a complete model.")
    fields = _ARCHITECTURES[header.architecture](header)
    for key, neutral in _NEUTRAL.items():
        value = header.get(key, neutral)
        if value != neutral and (value is False or value != 0):
            raise UnsupportedFeatureError(
                f"{header.path}: {header.architecture}.{key}={value!r} is not supported.",
                parameter="model",
                value=header.path,
            )
    return {
        **fields,
        # The padded size, where the vocabulary of the tokenizer may be smaller.
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": _dtype(header),
    }


def _dtype(header: GGUFHeader) -> str | None:
    """What the model was saved in, if it is not quantised; norms are float32 in any file."""
    types = {tensor.type.name for tensor in header.tensors.values()} - {"F32"}
    names = {"": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names.get(",".join(types))


def gguf_generation_config(header: GGUFHeader) -> dict[str, Any]:
    """The special token ids in the terms of generation_config.json.

    The end of a turn or of a message ends a generation as the end of the text does, so eos_token_id lists all three.
    """
    ids = {name: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    eos = [token_id for token_id in ids.values() if token_id is not None]
    eos = [token_id for place, token_id in enumerate(eos) if token_id not in eos[:place]]
    config = {
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": header.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {name: value for name, value in config.items() if value is not None}


_YARN_SETTINGS = ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier")


def _llama(header: GGUFHeader) -> dict[str, Any]:
    if header.get("expert_count", 0):
        raise UnsupportedFeatureError(
            f"{header.path} holds a mixture of {header.get('expert_count')} experts (Mixtral), which is not supported."
        )
    fields = _decoder_fields(header)
    rope = _rope(header, fields["head_dim"])
    if _LLAMA3_FACTORS in header.tensors:
        rope = {"rope_theta": rope["rope_theta"], **_llama3_rope(header, rope["rope_theta"])}
    fields["rope_parameters"] = rope
    sliding_window = header.get("attention.sliding_window", 0)
    if sliding_window:
        return {
            **fields,
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": sliding_window,
        }
    return {
        **fields,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
    }


def _qwen2(header: GGUFHeader) -> dict[str, Any]:
    fields = _decoder_fields(header)
    head_dim = fields.pop("head_dim")
    if head_dim * fields["num_attention_heads"] != fields["hidden_size"]:
        raise UnsupportedFeatureError(
            f"{header.path}: Qwen2 with heads of {head_dim} (attention.key_length) and a hidden size of "
            f"{fields['hidden_size']} is not supported."
        )
    return {
        **fields,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_parameters": _rope(header, head_dim),
    }


def _qwen3(header: GGUFHeader) -> dict[str, Any]:
    fields = _decoder_fields(header)
    return {
        **fields,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "rope_parameters": _rope(header, fields["head_dim"]),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
    }


def _gemma3(header: GGUFHeader) -> dict[str, Any]:
    fields = _decoder_fields(header)
    num_layers = fields["num_hidden_layers"]
    period = header.get("attention.sliding_window_pattern", 6)
    if isinstance(period, list):
        layer_types = ["sliding_attention" if local else "full_attention" for local in period]
    else:
        layer_types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)]
    is_27b = num_layers == _GEMMA_27B_LAYERS
    local_base = _decimal(header.get("rope.freq_base_swa", _GEMMA_LOCAL_ROPE_BASE))
    return {
        **fields,
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "rope_parameters": {
            "full_attention": _rope(header, fields["head_dim"], default_theta=1000000.0),
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
        "sliding_window": header.require("attention.sliding_window"),
        "layer_types": layer_types,
        "query_pre_attn_scalar": (
            fields["hidden_size"] // fields["num_attention_heads"] if is_27b else fields["head_dim"]
        ),
        "final_logit_softcapping": _optional_decimal(header.get("final_logit_softcapping")),
        "attn_logit_softcapping": _optional_decimal(header.get("attn_logit_softcapping")),
    }


def _phi3(header: GGUFHeader) -> dict[str, Any]:
    if header.get("expert_count", 0):
        raise UnsupportedFeatureError(
            f"{header.path} holds a mixture of experts (Phi-3.5-MoE), which is not supported."
        )
    fields = _decoder_fields(header)
    head_dim = fields.pop("head_dim")
    rotary_dim = header.get("rope.dimension_count", head_dim)
    rope = _rope(header, head_dim, partial_rotary=True)
    original_length = header.get("rope.scaling.original_context_length", fields["max_position_embeddings"])
    if _LONG_FACTORS in header.tensors:
        rope = {
            "rope_type": "longrope",
            "rope_theta": rope["rope_theta"],
            "long_factor": _read_floats(header, _LONG_FACTORS),
            "short_factor": _read_floats(header, _SHORT_FACTORS),
            "original_max_position_embeddings": original_length,
        }
    rope["partial_rotary_factor"] = rotary_dim / head_dim
    return {
        **fields,
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "rope_parameters": rope,
        "partial_rotary_factor": rotary_dim / head_dim,
        "original_max_position_embeddings": original_length,
        "sliding_window": header.get("attention.sliding_window") or None,
    }


def _gpt2(header: GGUFHeader) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": header.require("context_length"),
        "n_layer": header.require("block_count"),
        "n_embd": header.require("embedding_length"),
        "n_inner": header.require("feed_forward_length"),
        "n_head": header.require("attention.head_count"),
        "layer_norm_epsilon": _decimal(header.require("attention.layer_norm_epsilon")),
    }


_ARCHITECTURES: dict[str, Callable[[GGUFHeader], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}


def _decoder_fields(header: GGUFHeader) -> dict[str, Any]:
    """What the decoders with RMSNorm and a rotary embedding have in common."""
    fields = {field: header.require(key) for key, field in _COMMON_FIELDS.items()}
    fields["num_key_value_heads"] = header.get("attention.head_count_kv", fields["num_attention_heads"])
    for field, value in fields.items():
        if isinstance(value, list):
            raise UnsupportedFeatureError(f"{header.path}: {field} differs between layers, which is not supported.")
    fields["rms_norm_eps"] = _decimal(header.require("attention.layer_norm_rms_epsilon"))
    fields["head_dim"] = header.get("attention.key_length", fields["hidden_size"] // fields["num_attention_heads"])
    if header.get("attention.value_length", fields["head_dim"]) != fields["head_dim"]:
        raise UnsupportedFeatureError(f"{header.path}: values and keys of different sizes are not supported.")
    return fields


def _rope(
    header: GGUFHeader, head_dim: int, *, default_theta: float = 10000.0, partial_rotary: bool = False
) -> dict[str, Any]:
    """The rotary embedding as `rope_parameters` of transformers 5."""
    if not partial_rotary and header.get("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedFeatureError(
            f"{header.path}: rotary embeddings over {header.get('rope.dimension_count')} of {head_dim} dimensions are "
            f"not supported for the architecture {header.architecture}."
        )
    rope: dict[str, Any] = {"rope_theta": _decimal(header.get("rope.freq_base", default_theta))}
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 0))
    kind = header.get("rope.scaling.type", "linear" if factor else "none")  # as llama.cpp has it
    allowed = {"llama": {_LLAMA3_FACTORS}, "phi3": {_LONG_FACTORS, _SHORT_FACTORS}}.get(header.architecture, set())
    if others := sorted(CONFIG_TENSORS & header.tensors.keys() - allowed):
        raise UnsupportedFeatureError(
            f"{header.path}: {', '.join(others)} is not supported for the architecture {header.architecture}."
        )
    if kind == "longrope" and _LONG_FACTORS not in header.tensors:
        raise TacoValidationError(f"{header.path} has no tensor {_LONG_FACTORS}; convert the model again.")
    if kind in ("none", "longrope"):  # the factors of longrope are tensors
        rope["rope_type"] = "default"
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": _decimal(factor or header.require("rope.scaling.factor"))}
    elif kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": _decimal(header.require("rope.scaling.factor")),
            "original_max_position_embeddings": header.require("rope.scaling.original_context_length"),
        }
        given = [f"rope.scaling.{name}" for name in _YARN_SETTINGS if header.get(f"rope.scaling.{name}") is not None]
        if given:
            raise UnsupportedFeatureError(f"{header.path}: {', '.join(given)} in the metadata is not supported.")
    else:
        raise UnsupportedFeatureError(f"{header.path}: rope scaling of type {kind!r} is not supported.")
    return rope


def _llama3_rope(header: GGUFHeader, theta: float) -> dict[str, Any]:
    """Find the scaling of Llama 3.1 again: the file only has the factors that divide the frequencies.

    The rule (transformers, `_compute_llama3_parameters`) for a wavelength w is 1 / ((1 - s) / factor + s) with
    s = (original / w - low) / (high - low) clamped to [0, 1]. It depends on original / (high - low) and
    low / (high - low) only, so two wavelengths with 0 < s < 1 determine it, and the original length can be chosen.
    """
    factors = np.array(_read_floats(header, _LLAMA3_FACTORS))
    factor = float(factors.max())
    if factor == 1.0:
        return {"rope_type": "default"}
    inverse_wavelength = theta ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    (between,) = np.nonzero((smooth > 1e-4) & (smooth < 1 - 1e-4))
    if len(between) >= 2:
        slope, minus_low = np.polyfit(inverse_wavelength[between], smooth[between], 1)
        original = 8192
        spread = original / slope
        for decimals in (3, 9):  # published values are round numbers
            low, high = round(float(-minus_low * spread), decimals), round(float((1 - minus_low) * spread), decimals)
            fitted = np.clip((original * inverse_wavelength - low) / (high - low), 0, 1)
            if np.allclose(1 / ((1 - fitted) / factor + fitted), factors, rtol=1e-5):
                return {
                    "rope_type": "llama3",
                    "factor": _decimal(factor),
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    raise UnsupportedFeatureError(
        f"{header.path}: the factors in {_LLAMA3_FACTORS} do not follow the scaling rule of Llama 3.1; no other is "
        "supported."
    )


def _read_floats(header: GGUFHeader, name: str) -> Sequence[float]:
    """A small float32 tensor."""
    if name not in header.tensors:
        raise TacoValidationError(f"{header.path} has no tensor {name}; convert the model again.")
    tensor = header.tensors[name]
    if tensor.type.name != "F32":
        raise UnsupportedFeatureError(f"{header.path}: {name} is stored as {tensor.type.name}, not as F32.")
    values = np.fromfile(header.path, dtype="<f4", count=math.prod(tensor.shape), offset=tensor.offset)
    return [_decimal(value) for value in values]


def _decimal(value: float) -> float:
    """The number that was rounded to float32 when the file was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _optional_decimal(value: float | None) -> float | None:
    return None if value is None else _decimal(value)
