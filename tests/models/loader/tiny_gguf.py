"""Tiny GGUF files, written from tiny models of transformers the way llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1}

# model type -> (architecture in GGUF, arguments of the configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASE),
    "mistral": ("llama", {**BASE, "sliding_window": 8, "rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", BASE),
    "qwen3": ("qwen3", {**BASE, "head_dim": 32}),
    "gemma3_text": (
        "gemma3",
        {**BASE, "num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
        | {"tie_word_embeddings": True},
    ),
    "phi3": ("phi3", BASE),
    "gpt2": ("gpt2", {**GPT2, "eos_token_id": 2, "pad_token_id": 0, "n_inner": 128}),
}


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A model with random weights (norms included)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**MODELS[model_type][1], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.5)
    return model


def state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its weights, tied ones once."""
    return {name: param.data for name, param in model.named_parameters()}


def write_model(path: Path, model: PreTrainedModel, **extra_tensors: np.ndarray) -> gguf.GGUFWriter:
    """Start a GGUF file of a model: tensors and hyperparameters; the caller may add metadata, and calls `finish`."""
    config = model.config
    arch = MODELS[config.model_type][0]
    writer = gguf.GGUFWriter(str(path), arch)
    num_layers = config.num_hidden_layers
    writer.add_block_count(num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    if arch == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.model_type in ("qwen3", "gemma3_text"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type in ("mistral", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], num_layers)
    for name, tensor in state_dict(model).items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        writer.add_tensor(gguf_name, _converted(name, tensor.numpy(), config))
    for name, array in extra_tensors.items():
        writer.add_tensor(name.replace("__", "."), array)
    return writer


def _converted(name: str, array: np.ndarray, config: Any) -> np.ndarray:
    if config.model_type in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
        num_heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return array + 1
    if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
        return np.ascontiguousarray(array.T)
    return array


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
