"""What layers do beyond the kernels they call; what they compute is tested with whole models."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from taco.errors import UnsupportedFeatureError
from taco.kernels import native
from taco.kernels.linear import PackedWeight
from taco.kernels.metadata import AttentionMetadata, Workspace
from taco.layers import embedding as embedding_module
from taco.layers.activation import get_activation
from taco.layers.decoder import decoder_layer
from taco.layers.embedding import Embedding, LMHead
from taco.layers.linear import Linear, MergedLinear
from taco.layers.norm import QKNorm, RMSNorm
from taco.layers.rotary import RotaryEmbedding
from tests.models.harness import Runner, load, random_reference, tiny_config


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def fill(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter))


def empty_metadata() -> AttentionMetadata:
    none = torch.zeros(0, dtype=torch.int32)
    return AttentionMetadata(
        none, none, none, none, np.zeros(1, np.int32), np.zeros(0, np.int32), 0, 4, Workspace("cpu")
    )


def declared(layer: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    layer.declare_weights(
        lambda name, shape, param, *, dim=None, offset=0, transpose=False: calls.append(
            (name, shape, param, dim, offset, transpose)
        )
    )
    return calls


def test_a_merged_linear_layer_is_its_parts_side_by_side() -> None:
    layer = MergedLinear(8, [("a", 3), ("b", 5)], bias=True)
    assert declared(layer) == [
        ("a.weight", (3, 8), "weight", 0, 0, False),
        ("a.bias", (3,), "bias", 0, 0, False),
        ("b.weight", (5, 8), "weight", 0, 3, False),
        ("b.bias", (5,), "bias", 0, 3, False),
    ]
    fill(layer)
    x, weight, bias = torch.randn(4, 8), layer.weight.clone(), layer.bias.clone()
    layer.finalize()
    parts = [nn.functional.linear(x, weight[:3], bias[:3]), nn.functional.linear(x, weight[3:], bias[3:])]
    torch.testing.assert_close(layer(x), torch.cat(parts, -1))


def test_a_transposed_layer_declares_the_shape_in_the_checkpoint() -> None:
    layer = Linear(8, 3, "a", bias=False, transposed=True)
    assert declared(layer) == [("a.weight", (8, 3), "weight", 0, 0, True)]
    assert layer.weight.shape == (3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_lets_go_of_the_plain_weight(dtype: torch.dtype) -> None:
    layer = Linear(16, 32, "a", bias=False).to(dtype)
    fill(layer)
    plain = weakref.ref(layer.weight)
    layer.finalize()
    gc.collect()
    if layer.weight.is_mkldnn or isinstance(layer.weight, PackedWeight):
        assert plain() is None
    assert sum(parameter.numel() for parameter in layer.parameters()) == 512


@pytest.mark.parametrize(("limit", "is_packed"), [(16 * 8 * 4, True), (16 * 8 * 4 - 1, False)])
def test_a_tied_head_packs_a_copy_only_up_to_the_limit(
    monkeypatch: pytest.MonkeyPatch, limit: int, is_packed: bool
) -> None:
    monkeypatch.setattr(embedding_module, "MAX_PACKED_COPY_BYTES", limit)
    monkeypatch.setattr(native, "packs", lambda dtype: False)
    table = Embedding(16, 8, "embed")
    head = LMHead(16, 8, "lm_head", tied=table)
    assert head.weight is table.weight
    assert declared(head) == []
    fill(table)
    weight = table.weight.clone()
    table.finalize()
    head.finalize()
    if head.weight.is_mkldnn or not is_packed:  # there are CPUs without packing
        assert head.weight.is_mkldnn == is_packed
    x = torch.randn(3, 8)
    torch.testing.assert_close(head(x), x @ weight.T)
    assert torch.equal(table(torch.tensor([5, 0])), weight[[5, 0]])


@pytest.mark.skipif(native.library() is None, reason="no native kernels here")
def test_a_tied_head_shares_its_packed_weight_with_the_lookup() -> None:
    table = Embedding(50, 8, "embed")
    head = LMHead(50, 8, "lm_head", tied=table)
    fill(table)
    weight = table.weight.clone()
    table.finalize()
    head.finalize()
    assert head.weight is table.weight and isinstance(head.weight, PackedWeight)
    x = torch.randn(3, 8)
    torch.testing.assert_close(head(x), x @ weight.T)
    assert torch.equal(table(torch.tensor([49, 0])), weight[[49, 0]])


def test_a_head_of_its_own_is_declared_and_gives_float32() -> None:
    head = LMHead(16, 8, "lm_head", tied=None).to(torch.bfloat16)
    assert declared(head) == [("lm_head.weight", (16, 8), "weight", None, 0, False)]
    fill(head)
    head.finalize()
    assert head(torch.randn(3, 8).bfloat16()).dtype == torch.float32


def test_an_embedding_counts_from_its_first_row() -> None:
    table = Embedding(6, 4, "embed", first=2)
    fill(table)
    assert torch.equal(table(torch.tensor([0, 3])), table.weight[[2, 5]])


def test_norms_around_one_keep_the_resolution_of_the_checkpoint() -> None:
    norm = RMSNorm(8, "norm", 1e-6, plus_one=True).to(torch.bfloat16)
    norm.weight.fill_(2**-10)
    norm.finalize()
    assert torch.equal(norm.weight, torch.full((8,), 1 + 2**-10))


def test_query_and_key_heads_are_normalised_with_their_own_weights() -> None:
    norm = QKNorm(3, 2, 8, "q", "k", 1e-6)
    assert declared(norm) == [("q.weight", (8,), "query", None, 0, False), ("k.weight", (8,), "key", None, 0, False)]
    norm.query.fill_(2.0)
    norm.key.fill_(3.0)
    norm.finalize()
    heads = norm(torch.randn(4, 5, 8)).square().mean(-1).sqrt()  # root mean square of each head
    torch.testing.assert_close(heads, torch.tensor([2.0, 2.0, 2.0, 3.0, 3.0]).expand(4, 5), rtol=1e-4, atol=0)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


def test_layers_that_share_a_rotary_embedding_share_the_angles_of_a_step() -> None:
    rotary, other = (RotaryEmbedding(tiny_config("llama"), 8) for _ in range(2))
    for embedding in (rotary, other):
        embedding.finalize(torch.device("cpu"), 96)
    meta = empty_metadata()
    positions = torch.tensor([0, 7, 3])
    first = rotary.angles(positions, torch.bfloat16, meta)
    assert first[0].shape == (3, 1, 8)
    assert first[0].dtype == torch.bfloat16
    assert rotary.angles(positions, torch.bfloat16, meta) is first
    assert other.angles(positions, torch.bfloat16, meta) is not first
    assert rotary.angles(positions, torch.bfloat16, empty_metadata()) is not first


def test_unknown_activations_are_refused_with_a_list() -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"gated activation 'relu'.*silu"):
        get_activation("relu", gated=True)
    with pytest.raises(UnsupportedFeatureError, match="activation 'x'.*relu"):
        get_activation("x")


def test_a_candidate_can_take_over_whole_decoder_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(random_reference(tiny_config("llama")))
    seen: list[int] = []

    def fake(layer: Any, x: torch.Tensor, residual: torch.Tensor | None, *_: Any) -> Any:
        seen.append(layer.attention.attention.layer_idx)
        return x, torch.zeros_like(x)

    monkeypatch.setattr(decoder_layer, "_order", [fake])
    Runner(model).step({0: [1, 2, 3]})
    assert seen == [0, 1]
