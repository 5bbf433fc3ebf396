"""Every architecture computes what transformers computes, from tiny random models in float32."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.kernels import native
from taco.models.registry import register_model, resolve_model_class, supported_architectures
from tests.models.harness import (
    Runner,
    load,
    load_tensors,
    random_reference,
    reference_greedy,
    reference_logits,
    tiny_config,
)

TOLERANCE = 1e-4


@pytest.fixture(autouse=True, params=["native kernels", "torch operators"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the native CPU kernels, where there are any, and as without them."""
    if request.param == "torch operators":
        monkeypatch.setattr(native, "_load", lambda: (None, "switched off by the test"))
    elif native.library() is None:
        pytest.skip(native.why_missing() or "")


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 24}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 10, "tie_word_embeddings": True}

# id -> model type and settings, in which each feature of the architecture differs from its default at least once.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa-head_dim": ("llama", {"num_key_value_heads": 1, "head_dim": 6}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-sizes": ("llama", {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 1,
                                  "intermediate_size": 37, "vocab_size": 101, "num_hidden_layers": 3}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 50.0}}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 10}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
                               "tie_word_embeddings": True}),
    "qwen2-types": ("qwen2", {"use_sliding_window": True, "sliding_window": 6,
                              "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-bias-window": ("qwen3", {"head_dim": 16, "attention_bias": True, "use_sliding_window": True,
                                    "sliding_window": 4, "max_window_layers": 1}),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window": 5, "num_hidden_layers": 3,
                                       "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "gemma3-pattern": ("gemma3_text", GEMMA | {"sliding_window": 6, "num_hidden_layers": 4,
                                               "sliding_window_pattern": 2, "attention_bias": True}),
    "gemma3-untied": ("gemma3_text", GEMMA | {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "gemma3-linear": ("gemma3_text", GEMMA | {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}}),
    "phi3": ("phi3", {}),
    "phi3-window-tied": ("phi3", {"sliding_window": 5, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 40.0,
                                                  "partial_rotary_factor": 0.75}}),
    "phi3-odd-rotation": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 40.0,
                                                       "partial_rotary_factor": 0.4}}),
    "gpt2": ("gpt2", {}),
    "gpt2-inner": ("gpt2", {"n_inner": 50, "activation_function": "gelu", "tie_word_embeddings": False}),
    "gpt2-scales": ("gpt2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
                             "reorder_and_upcast_attn": True}),
    "opt": ("opt", {}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-projected-untied": ("opt", {"word_embed_proj_dim": 20, "tie_word_embeddings": False,
                                     "activation_function": "gelu"}),
    "opt-bare": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt-no-final-norm": ("opt", {"_remove_final_layer_norm": True}),
}  # fmt: skip


def prompts_for(config: Any, lengths: list[int], seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(config.vocab_size) for _ in range(length)] for length in lengths]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_however_prompts_are_packed_and_cut(variant: str) -> None:
    reference = random_reference(tiny_config(VARIANTS[variant][0], **VARIANTS[variant][1]))
    model = load(reference)
    prompts = prompts_for(reference.config, [19, 1, 11])
    expected = [reference_logits(reference, prompt) for prompt in prompts]
    assert all(logits.std() > 0.3 for logits in expected), "logits too small to tell anything"

    whole = Runner(model).step(dict(enumerate(prompts)))
    for row in range(3):
        assert_close(whole[row], expected[row])

    runner = Runner(model)
    first = runner.step({0: prompts[0][:7], 2: prompts[2][:1]})
    second = runner.step({0: prompts[0][7:8], 1: prompts[1], 2: prompts[2][1:6]})
    third = runner.step({0: prompts[0][8:], 2: prompts[2][6:]})
    assert_close(torch.cat([first[0], second[0], third[0]]), expected[0])
    assert_close(second[1], expected[1])
    assert_close(torch.cat([first[2], second[2], third[2]]), expected[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_transformers(variant: str) -> None:
    reference = random_reference(tiny_config(VARIANTS[variant][0], **VARIANTS[variant][1]), seed=1)
    prompts = dict(enumerate(prompts_for(reference.config, [9, 3], seed=1)))
    generated = Runner(load(reference)).greedy(prompts, 7)
    assert generated == {row: reference_greedy(reference, prompt, 7)[0] for row, prompt in prompts.items()}


@pytest.mark.parametrize("length", [30, 50])
def test_longrope_takes_the_set_of_the_longest_sequence(length: int) -> None:
    config = tiny_config(
        "phi3", rope_parameters=dict(LONGROPE), original_max_position_embeddings=32, max_position_embeddings=96
    )
    reference = random_reference(config)
    (prompt,) = prompts_for(config, [length])
    runner = Runner(load(reference, max_model_len=length))
    logits = torch.cat([runner.step({0: prompt[:20]})[0], runner.step({0: prompt[20:]})[0]])
    assert_close(logits, reference_logits(reference, prompt))


@pytest.mark.parametrize("variant", ["llama", "qwen3-bias-window", "gemma3", "gpt2", "opt-350m"])
def test_bfloat16_errs_no_more_than_transformers_does(variant: str) -> None:
    config = tiny_config(VARIANTS[variant][0], **VARIANTS[variant][1])
    reference = random_reference(config)
    prompts = prompts_for(config, [40, 40, 40])
    exact = torch.cat([reference_logits(reference, prompt) for prompt in prompts])
    rounded = reference.to(torch.bfloat16)
    model = load(rounded, dtype=torch.bfloat16)
    theirs = (torch.cat([reference_logits(rounded, prompt) for prompt in prompts]) - exact).abs().mean()
    logits = Runner(model, dtype=torch.bfloat16).step(dict(enumerate(prompts)))
    ours = (torch.cat([logits[row] for row in range(3)]) - exact).abs().mean()
    assert 0 < ours < 1.2 * theirs


def test_gemma_scales_embeddings_by_a_factor_rounded_as_the_weights() -> None:
    reference = random_reference(tiny_config("gemma3_text", **GEMMA)).to(torch.bfloat16)
    model = load(reference, dtype=torch.bfloat16)
    token_ids = torch.arange(200)
    assert torch.equal(model.embed(token_ids), reference.model.embed_tokens(token_ids))


@pytest.mark.parametrize("variant", ["llama", "gemma3", "gpt2", "opt"])
def test_a_row_is_computed_alike_alone_and_in_a_batch(variant: str) -> None:
    model = load(random_reference(tiny_config(VARIANTS[variant][0], **VARIANTS[variant][1])))
    config = tiny_config(VARIANTS[variant][0], **VARIANTS[variant][1])
    prompts = prompts_for(config, [13, 1, 6, 8, 1])
    batch = Runner(model).step(dict(enumerate(prompts)))
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(Runner(model).step({0: prompt})[0], batch[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("variant", "prefix"),
    [("llama", "model."), ("gemma3", "model."), ("gpt2", "transformer."), ("opt", "model."), ("opt", "model.decoder.")],
)
def test_checkpoints_of_the_bare_model_load(variant: str, prefix: str) -> None:
    config = tiny_config(VARIANTS[variant][0], **VARIANTS[variant][1] | {"tie_word_embeddings": True})
    reference = random_reference(config)
    tensors = {
        name.removeprefix(prefix): tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"
    }
    (prompt,) = prompts_for(config, [9])
    logits = Runner(load_tensors(config, tensors)).step({0: prompt})[0]
    assert_close(logits, reference_logits(reference, prompt))


def test_masks_in_old_gpt2_checkpoints_are_ignored() -> None:
    reference = random_reference(tiny_config("gpt2"))
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 96, 96) for layer in range(2)}
    load_tensors(reference.config, reference.state_dict() | masks)


@pytest.mark.parametrize(
    ("model_type", "settings", "name"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("llama", {"hidden_act": "relu2"}, "relu2"),
        ("opt", {"activation_function": "mish"}, "mish"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 9.0}}, "proportional"),
        *((model_type, {"is_causal": off}, "is_causal") for model_type, off in [
            ("llama", False), ("mistral", 0), ("qwen3", None), ("gemma3_text", False), ("gpt2", False), ("opt", False),
        ]),
    ],
)  # fmt: skip
def test_settings_that_are_not_implemented_are_named(model_type: str, settings: dict[str, Any], name: str) -> None:
    config = tiny_config(model_type, **settings)
    with torch.device("meta"), pytest.raises(UnsupportedFeatureError, match=name):
        resolve_model_class(config)(config)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 2.0, 1e5])
def test_no_more_dimensions_rotate_than_there_are(fraction: float) -> None:
    rope = {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": fraction}
    config = tiny_config("phi3", rope_parameters=rope)
    with torch.device("meta"), pytest.raises(TacoValidationError, match=f"partial_rotary_factor={fraction}"):
        resolve_model_class(config)(config)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mistral", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"mlp_bias": True}),
        ("phi3", {"attention_bias": True}),
    ],
)
def test_biases_that_transformers_does_not_make_are_not_wanted(model_type: str, settings: dict[str, Any]) -> None:
    load(random_reference(tiny_config(model_type, **settings)))


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("mistral", "LlamaForCausalLM"), ("llama", "MistralForCausalLM"), ("granite", "LlamaForCausalLM")],
)
def test_an_architecture_of_another_model_type_is_refused(model_type: str, architecture: str) -> None:
    config = tiny_config(model_type, architectures=[architecture])
    with pytest.raises(TacoValidationError, match=f"{architecture}, and the model_type='{model_type}' of another one"):
        resolve_model_class(config)


def test_dynamic_scaling_is_refused_past_the_positions_where_it_would_change_cached_keys() -> None:
    reference = random_reference(tiny_config(*VARIANTS["llama-dynamic"][:1], **VARIANTS["llama-dynamic"][1]))
    load(reference, max_model_len=96)
    with pytest.raises(TacoValidationError, match="Set max_model_len to 96 or less"):
        load(reference, max_model_len=97)


@pytest.mark.parametrize(("variant", "expected"), [("llama", 96), ("llama-yarn", 96), ("llama-linear", 288),
                                                   ("gpt2", 96), ("opt", 96), ("gemma3-linear", 96)])  # fmt: skip
def test_max_position_includes_the_extension_by_scaling(variant: str, expected: int) -> None:
    config = tiny_config(VARIANTS[variant][0], **VARIANTS[variant][1])
    with torch.device("meta"):
        assert resolve_model_class(config)(config).max_position == expected


def test_every_supported_architecture_resolves_by_name_and_by_model_type() -> None:
    for model_type in ("gemma3_text", "gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"):
        config = tiny_config(model_type)
        config.architectures = None
        by_type = resolve_model_class(config)
        config.architectures = [by_type.__name__]
        assert resolve_model_class(config) is by_type
        assert by_type.__name__ in supported_architectures()


def test_unknown_architectures_are_refused_with_the_list_of_supported_ones() -> None:
    config = tiny_config("llama")
    config.architectures = ["BloomForCausalLM"]
    with pytest.raises(TacoValidationError, match="BloomForCausalLM is not supported.*LlamaForCausalLM"):
        resolve_model_class(config)


def test_registered_models_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taco.models.registry._MODELS", {})
    register_model("MyLlama", "taco.models.llama:LlamaForCausalLM")
    config = tiny_config("llama")
    config.architectures = ["MyLlama"]
    assert resolve_model_class(config).__name__ == "LlamaForCausalLM"
    with pytest.raises(TacoValidationError, match="module:Class"):
        register_model("Broken", "taco.models.llama")
