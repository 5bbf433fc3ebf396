"""Weights that are replaced in a model in use give what a model has that was loaded with them."""

from __future__ import annotations

import pytest
import torch

from taco.errors import EngineAsleepError, TacoValidationError
from taco.kernels import native
from taco.kernels.linear import PackedWeight
from taco.layers.norm import RMSNorm
from taco.models.loader.update import Placement, drop_weights
from tests.models.harness import Runner, load_tensors, random_reference, tiny_config

PROMPT = [5, 17, 100, 3, 44, 9, 81]

# One or several of each kind of layer: merged, with biases, transposed, normalised heads, norms plus one, tied heads.
CONFIGS = {
    "llama": tiny_config("llama", attention_bias=True, mlp_bias=True),
    "qwen3-tied": tiny_config("qwen3", head_dim=12, tie_word_embeddings=True),
    "gemma3": tiny_config(
        "gemma3_text", head_dim=12, query_pre_attn_scalar=10, tie_word_embeddings=True, sliding_window=5
    ),
    "phi3": tiny_config("phi3"),
    "gpt2": tiny_config("gpt2"),
    "opt-projected": tiny_config("opt", word_embed_proj_dim=20),
}


@pytest.fixture(params=["native kernels", "torch operators"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch operators":
        monkeypatch.setattr(native, "_load", lambda: (None, "switched off by the test"))
    elif native.library() is None:
        pytest.skip(native.why_missing() or "")


def build(config, state, dtype=torch.float32):
    model = load_tensors(config, state, dtype=dtype)
    model.placement = Placement(config, torch.device("cpu"), dtype)
    return model


def logits(model, dtype=torch.float32):
    return Runner(model, dtype=dtype).step({0: PROMPT})[0]


def states(config):
    return [random_reference(config, seed).state_dict() for seed in (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_new_weights_give_the_logits_of_a_model_loaded_with_them(name, dtype, kernels):
    old, new = states(CONFIGS[name])
    expected = logits(build(CONFIGS[name], new, dtype), dtype)
    for weights in (new, reversed(new.items())):
        model = build(CONFIGS[name], old, dtype)
        assert not torch.equal(logits(model, dtype), expected)
        assert model.load_weights(weights) <= new.keys()
        assert torch.equal(logits(model, dtype), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_any_part_of_the_weights_may_be_replaced(name, kernels):
    old, new = states(CONFIGS[name])
    model = build(CONFIGS[name], old)
    logits(model)  # what kernels derive from the weights is there
    for index, tensor_name in enumerate(sorted(new, key=lambda name: name[::-1])):
        if index % 3 == 0:
            model.load_weights([(tensor_name, new[tensor_name].double())])
            old = {**old, tensor_name: new[tensor_name]}
    assert torch.equal(logits(model), logits(build(CONFIGS[name], old)))


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_that_are_dropped_come_back_in_any_order_and_in_pieces(name, kernels):
    config = CONFIGS[name]
    old, new = states(config)
    model = build(config, old)
    method = model.compute_logits
    drop_weights(model)
    assert not any(isinstance(parameter, PackedWeight) for parameter in model.parameters())
    assert all(parameter.is_meta for parameter in model.parameters())
    items = list(new.items())[::-1]
    model.load_weights(items[:5])
    assert model.missing_weights and not model.missing_weights & {name for name, _ in items[:5]}
    model.load_weights(items[5:])
    assert not model.missing_weights
    assert torch.equal(logits(model), logits(build(config, new)))
    assert method.__self__ is model


def test_layers_stay_packed_and_updates_are_counted():
    old, new = states(CONFIGS["qwen3-tied"])
    model = build(CONFIGS["qwen3-tied"], old)
    before = {name: type(parameter) for name, parameter in model.named_parameters()}
    model.load_weights(new)
    model.load_weights([])
    assert {name: type(parameter) for name, parameter in model.named_parameters()} == before
    assert model.num_weight_updates == 2
    if native.library() is not None:  # oneDNN packs a copy
        assert model.head.weight is model.embedding.weight


def test_a_tied_head_is_passed_over():
    old, new = states(CONFIGS["qwen3-tied"])
    model = build(CONFIGS["qwen3-tied"], old)
    assert model.load_weights({"lm_head.weight": new["model.embed_tokens.weight"]}) == set()
    assert torch.equal(logits(model), logits(build(CONFIGS["qwen3-tied"], old)))


def test_names_without_the_prefix_of_the_model_are_known():
    old, new = states(CONFIGS["llama"])
    model = build(CONFIGS["llama"], old)
    assert model.load_weights({name.removeprefix("model."): tensor for name, tensor in new.items()})
    assert torch.equal(logits(model), logits(build(CONFIGS["llama"], new)))


NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.7.mlp.up_proj.weight", torch.zeros(56, 32), "is not among the weights of this model"),
        (NAME, torch.zeros(16, 31), r"has the shape \[16, 31\], and \[16, 32\] is wanted"),
        (NAME, torch.zeros(16, 32, dtype=torch.int8), "is stored as torch.int8"),
        (NAME, torch.zeros(16, 32).to(torch.float8_e4m3fn), "is stored as torch.float8_e4m3fn"),
        (NAME, [0.0], "is of type list"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(name, tensor, message):
    old, new = states(CONFIGS["llama"])
    model = build(CONFIGS["llama"], old)
    expected = logits(model)
    with pytest.raises(TacoValidationError, match=f"nothing was changed.\n{name} {message}"):
        model.load_weights({**new, name: tensor})
    assert torch.equal(logits(model), expected)
    assert model.num_weight_updates == 0


def test_an_iterator_is_taken_up_to_its_first_error():
    old, new = states(CONFIGS["llama"])
    model = build(CONFIGS["llama"], old)
    items = [*list(new.items())[:4], ("x", torch.zeros(1)), *list(new.items())[4:]]
    with pytest.raises(TacoValidationError, match="x is not among .* The 4 tensors that came before it were taken"):
        model.load_weights(iter(items))
    assert torch.equal(logits(model), logits(build(CONFIGS["llama"], old | dict(items[:4]))))


def test_weights_that_were_moved_away_are_left_alone():
    old, new = states(CONFIGS["llama"])
    model = build(CONFIGS["llama"], old)
    model.placement = Placement(CONFIGS["llama"], torch.device("cuda"), torch.float32)
    with pytest.raises(EngineAsleepError, match="asleep"):
        model.load_weights(new)


def test_a_norm_with_plus_one_is_the_same_after_it_was_reopened():
    norm = RMSNorm(9, "n", 1e-6, plus_one=True)
    norm.weight.data = torch.tensor([0, 1e-9, -1e-6, 0.3, -0.999, -1.0, 7.7, -300.1, 3e7])
    norm.finalize()
    expected = norm.weight.clone()
    norm.reopen()
    norm.finalize()
    assert torch.equal(norm.weight, expected)
