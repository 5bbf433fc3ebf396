"""Frozen configs: what client code reads from them."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest

from taco.config import CacheConfig, ModelConfig, ParallelConfig


def model_config(**values: Any) -> ModelConfig:
    text_config = types.SimpleNamespace(
        **{"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 6, "vocab_size": 100, **values}
    )
    source: Any = types.SimpleNamespace(kind="folder", path="/models/fake")
    config: Any = text_config
    return ModelConfig(
        model="fake",
        source=source,
        tokenizer="fake",
        dtype_name="bfloat16",
        max_model_len=32,
        logprobs_mode="raw_logprobs",
        served_model_name="fake",
        hf_config=config,
        hf_text_config=config,
        generation_config={"eos_token_id": 2},
        default_sampling_params={"top_k": 4},
        vocab_size=100,
    )


def test_numbers_of_the_model() -> None:
    config = model_config()
    assert config.get_vocab_size() == 100
    assert config.get_hidden_size() == 64
    assert config.get_head_size() == 8
    assert config.get_num_attention_heads() == config.get_num_kv_heads() == 8
    assert config.get_num_layers() == 6


def test_numbers_that_configs_may_state() -> None:
    config = model_config(head_dim=32, num_key_value_heads=2)
    assert config.get_head_size() == 32
    assert config.get_num_kv_heads() == 2


def test_head_size_that_is_stated_as_none_is_derived() -> None:
    assert model_config(head_dim=None, num_key_value_heads=None).get_head_size() == 8


def test_numbers_of_one_device() -> None:
    parallel = ParallelConfig(tensor_parallel_size=4, pipeline_parallel_size=2)
    config = model_config(num_key_value_heads=2)
    assert config.get_num_attention_heads(parallel) == 2
    assert config.get_num_kv_heads(parallel) == 1
    assert config.get_num_layers(parallel) == 3
    assert parallel.world_size == 8


def test_sampling_defaults_and_generation_config_are_copies() -> None:
    config = model_config()
    config.get_diff_sampling_param()["top_k"] = 5
    config.try_get_generation_config().clear()
    assert config.get_diff_sampling_param() == {"top_k": 4}
    assert config.try_get_generation_config() == {"eos_token_id": 2}


def test_what_holds_for_every_model() -> None:
    config = model_config()
    assert (config.runner_type, config.task) == ("generate", "generate")
    assert not (config.is_multimodal_model or config.is_encoder_decoder or config.is_cross_encoder)


def test_dtype_as_an_object_of_torch() -> None:
    import torch

    assert model_config().dtype is torch.bfloat16


def test_configs_are_frozen_and_replaced() -> None:
    config = CacheConfig(kv_cache_dtype="float32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_gpu_blocks = 7  # type: ignore[misc]
    profiled = dataclasses.replace(config, num_gpu_blocks=7, num_cpu_blocks=2)
    assert (config.num_gpu_blocks, profiled.num_gpu_blocks, profiled.num_cpu_blocks) == (None, 7, 2)
