from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader.source import ModelSource, load_generation_config, load_hf_config
from tests.models.loader.tiny_gguf import MODELS, finish, tiny_model, write_model

# What a file cannot say, or what is equal in effect.
NOT_COMPARED = {"_name_or_path", "architectures", "dtype", "original_max_position_embeddings", "partial_rotary_factor"}

LONG = {"max_position_embeddings": 1 << 20}  # longer than any original length


def config_of(
    path: Path,
    model_type: str,
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    *,
    changes: dict[str, Any] | None = None,
    **tensors: np.ndarray,
) -> PretrainedConfig:
    writer = write_model(path, tiny_model(model_type, **changes or {}), **tensors)
    add(writer)
    finish(writer)
    return load_hf_config(ModelSource("gguf", str(path)))


@pytest.mark.parametrize("model_type", MODELS)
def test_the_configuration_is_that_of_the_converted_model(tmp_path: Path, model_type: str) -> None:
    original = tiny_model(model_type).config.to_dict()
    config = config_of(tmp_path / "model.gguf", model_type)
    fields = config.to_dict()
    for name in original.keys() - NOT_COMPARED:
        assert fields[name] == original[name], name
    assert config.architectures[0].lower().startswith(model_type.removesuffix("_text"))
    assert config.dtype == torch.float32


def test_the_dtype_is_that_of_the_unquantised_weights(tmp_path: Path) -> None:
    def dtype(**tensors: np.ndarray) -> torch.dtype | None:
        return config_of(tmp_path / "model.gguf", "llama", **tensors).dtype

    assert dtype(x__weight=np.ones(2, dtype=np.float16)) == torch.float16
    assert dtype(x__weight=np.ones((2, 34), dtype=np.int8)) is None


def test_a_model_without_an_output_layer_has_tied_embeddings(tmp_path: Path) -> None:
    assert not config_of(tmp_path / "a.gguf", "llama").tie_word_embeddings
    assert config_of(tmp_path / "b.gguf", "llama", changes={"tie_word_embeddings": True}).tie_word_embeddings


def test_biases_of_llama_are_seen(tmp_path: Path) -> None:
    config = config_of(tmp_path / "model.gguf", "llama", changes={"attention_bias": True, "mlp_bias": True})
    assert config.attention_bias and config.mlp_bias


def llama3_factors(theta: float, head_dim: int, rope: dict[str, float]) -> np.ndarray:
    """As llama.cpp's converter computes the tensor rope_freqs.weight, from the published rule."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        old = rope["original_max_position_embeddings"]
        if wavelength < old / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > old / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            span = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (old / wavelength - rope["low_freq_factor"]) / span
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_scaling_of_published_llama3_models_is_found_again(tmp_path: Path, head_dim: int) -> None:
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = config_of(
        tmp_path / "model.gguf",
        "llama",
        changes={"head_dim": head_dim, **LONG, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        add=lambda writer: writer.add_key_length(head_dim),
        rope_freqs__weight=llama3_factors(500000.0, head_dim, rope),
    )
    assert config.rope_parameters == {"rope_type": "llama3", "rope_theta": 500000.0, **rope}


@settings(max_examples=15, deadline=None)
@given(
    factor=st.floats(1.5, 64),
    low=st.floats(0.5, 3),
    span=st.floats(2, 8),
    original=st.sampled_from([2048, 4096, 8192, 32768]),
)
def test_any_llama3_scaling_keeps_its_frequencies(
    tmp_path_factory: pytest.TempPathFactory, factor: float, low: float, span: float, original: int
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + span,
        "original_max_position_embeddings": original,
    }
    config = config_of(
        tmp_path_factory.mktemp("gguf") / "model.gguf",
        "llama",
        changes={"head_dim": 128, **LONG, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        add=lambda writer: writer.add_key_length(128),
        rope_freqs__weight=llama3_factors(500000.0, 128, rope),
    )
    reference = tiny_model("llama", head_dim=128, rope_parameters=rope, **LONG).config
    inverse_frequencies = [ROPE_INIT_FUNCTIONS["llama3"](c, torch.device("cpu"))[0] for c in (config, reference)]
    torch.testing.assert_close(*inverse_frequencies, rtol=1e-5, atol=0)


def test_factors_of_another_rule_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="do not follow the scaling rule of Llama 3"):
        config_of(
            tmp_path / "model.gguf",
            "llama",
            rope_freqs__weight=np.array([1, 2, 1.5, 4, 3, 8, 8, 8], dtype=np.float32),
        )


def test_linear_and_yarn_scaling_are_read(tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    config = config_of(tmp_path / "a.gguf", "gemma3_text", linear)
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = config_of(tmp_path / "b.gguf", "qwen2", yarn)
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }


def test_the_long_rope_of_phi3_is_read_from_its_tensors(tmp_path: Path) -> None:
    def longrope(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_dimension_count(8)
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_sliding_window(0)

    config = config_of(
        tmp_path / "model.gguf",
        "phi3",
        longrope,
        rope_factors_long__weight=np.array([1.1, 2, 3, 4], dtype=np.float32),
        rope_factors_short__weight=np.array([1, 1.2, 1.3, 1.4], dtype=np.float32),
    )
    assert config.rope_parameters == {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "long_factor": [1.1, 2, 3, 4],
        "short_factor": [1, 1.2, 1.3, 1.4],
        "original_max_position_embeddings": 128,
        "partial_rotary_factor": 0.5,
    }
    assert config.sliding_window is None
    # transformers computes frequencies from it
    assert ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))[0].shape == (4,)


def with_yarn(writer: gguf.GGUFWriter, architecture: str) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_float32(f"{architecture}.rope.scaling.yarn_beta_fast", 4.0)


@pytest.mark.parametrize("name", ["rope_factors_long.weight", "rope_freqs.weight"])
def test_tensors_of_other_rotary_embeddings_are_not_passed_over(tmp_path: Path, name: str) -> None:
    tensors = {name.replace(".", "__"): np.ones(4, dtype=np.float32)}
    with pytest.raises(UnsupportedFeatureError, match=f"{name} is not supported for the architecture qwen3"):
        config_of(tmp_path / "model.gguf", "qwen3", lambda writer: None, **tensors)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_scaling_without_a_type_is_linear(tmp_path: Path, key: str) -> None:
    config = config_of(tmp_path / "model.gguf", "llama", lambda writer: writer.add_float32(f"llama.{key}", 4.0))
    assert config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model_type", "add", "message"),
    [
        ("llama", lambda writer: writer.add_expert_count(8), "mixture of 8 experts"),
        ("llama", lambda writer: writer.add_rope_dimension_count(8), "over 8 of 16 dimensions"),
        ("llama", lambda writer: writer.add_value_length(8), "different sizes"),
        ("qwen2", lambda writer: writer.add_key_length(32), "heads of 32"),
        ("llama", lambda writer: writer.add_string("llama.rope.scaling.type", "su"), "'su' is not supported"),
        ("llama", lambda writer: writer.add_bool("llama.attention.causal", False), "attention.causal=False"),
        ("qwen3", lambda writer: writer.add_float32("qwen3.logit_scale", 0.25), "logit_scale=0.25"),
        ("qwen3", lambda writer: writer.add_expert_count(4), "expert_count=4"),
        ("gpt2", lambda writer: writer.add_float32("gpt2.attention.scale", 0.5), "attention.scale=0.5"),
        ("qwen2", lambda writer: with_yarn(writer, "qwen2"), "yarn_beta_fast"),
    ],
)
def test_variants_that_are_not_supported_are_named(
    tmp_path: Path, model_type: str, add: Callable[[gguf.GGUFWriter], None], message: str
) -> None:
    with pytest.raises(UnsupportedFeatureError, match=message):
        config_of(tmp_path / "model.gguf", model_type, add)


def test_other_architectures_are_refused_with_a_list(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    finish(gguf.GGUFWriter(str(path), "mamba"))
    with pytest.raises(UnsupportedFeatureError, match="'mamba'.*gemma3, gpt2, llama, phi3, qwen2, qwen3"):
        load_hf_config(ModelSource("gguf", str(path)))


def test_a_file_without_a_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    finish(gguf.GGUFWriter(str(path), "llama"))
    with pytest.raises(TacoValidationError, match=r"no tensor token_embd\.weight"):
        load_hf_config(ModelSource("gguf", str(path)))


def test_the_end_of_a_turn_ends_a_generation(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    config_of(path, "llama")
    assert load_generation_config(path) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config_of(path, "llama", lambda writer: writer.add_eot_token_id(7))
    assert load_generation_config(ModelSource("gguf", str(path)))["eos_token_id"] == [2, 7]
    config_of(path, "llama", lambda writer: writer.add_eot_token_id(2))
    assert load_generation_config(path)["eos_token_id"] == 2


@pytest.mark.real_model
def test_the_configuration_of_smollm2(smollm2_path: Path) -> None:
    config = load_hf_config(ModelSource("gguf", str(smollm2_path)))
    assert config.model_type == "llama" and config.tie_word_embeddings and config.vocab_size == 49152
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.rms_norm_eps == 1e-05 and config.rope_parameters["rope_theta"] == 100000.0
    assert config.max_position_embeddings == 8192 and config.eos_token_id == 2
