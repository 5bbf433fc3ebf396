from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import nn

from taco.errors import TacoValidationError
from taco.models.loader.apply import load_dummy_weights, load_weights
from taco.models.loader.checkpoint import TensorInfo, WeightEntry


class MemoryCheckpoint:
    """A checkpoint in memory that counts what is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.num_read = 0

    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(t.shape), str(t.dtype)[6:]) for name, t in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        self.num_read += 1
        return self.tensors[name]

    def close(self) -> None:
        pass


class BlocksOfTwo(MemoryCheckpoint):
    def read_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, len(self.tensors[name]), 2):
            yield start, self.tensors[name][start : start + 2]

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError("only blocks are wanted")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.Parameter(torch.empty(4))


class Model(nn.Module):
    """Two layers with fused projections, and an output layer that may be tied."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("table", torch.empty(3))


def meta_model(tied: bool = False) -> Model:
    with torch.device("meta"):
        return Model(tied)


def entries(tied: bool = False) -> list[WeightEntry]:
    wanted = [WeightEntry("model.embed.weight", (10, 4), "embed.weight", aliases=("embed.weight",))]
    for i in range(2):
        for j, part in enumerate("qkv"):
            name = f"model.layers.{i}.{part}"
            fused = f"layers.{i}.qkv"
            wanted.append(WeightEntry(f"{name}.weight", (4, 4), f"{fused}.weight", dim=0, offset=4 * j))
            wanted.append(WeightEntry(f"{name}.bias", (4,), f"{fused}.bias", dim=0, offset=4 * j))
        wanted.append(WeightEntry(f"model.layers.{i}.norm.weight", (4,), f"layers.{i}.norm"))
    if not tied:
        wanted.append(WeightEntry("head.weight", (4, 10), "head.weight", transpose=True))
    return wanted


def weights(tied: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {entry.name: torch.randn(entry.shape) for entry in entries(tied)}


def load(model: nn.Module, wanted: list[WeightEntry], checkpoint: MemoryCheckpoint, **options: object) -> None:
    load_weights(model, wanted, checkpoint, **{"device": "cpu", "dtype": torch.float32, **options})


@pytest.mark.parametrize("kind", [MemoryCheckpoint, BlocksOfTwo])
def test_fused_and_transposed_weights_arrive(kind: type[MemoryCheckpoint]) -> None:
    model, tensors = meta_model(), weights()
    load(model, entries(), kind(tensors))
    assert torch.equal(model.embed.weight, tensors["model.embed.weight"])
    for i, layer in enumerate(model.layers):
        for suffix in ("weight", "bias"):
            parts = [tensors[f"model.layers.{i}.{part}.{suffix}"] for part in "qkv"]
            assert torch.equal(getattr(layer.qkv, suffix), torch.cat(parts))
        assert torch.equal(layer.norm, tensors[f"model.layers.{i}.norm.weight"])
    assert torch.equal(model.head.weight, tensors["head.weight"].t())
    assert not any(param.requires_grad or param.is_meta for param in model.parameters())
    assert model.table.is_meta


def test_weights_are_cast() -> None:
    model, tensors = meta_model(), {name: tensor.to(torch.float16) for name, tensor in weights().items()}
    load(model, entries(), MemoryCheckpoint(tensors), dtype=torch.bfloat16)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.embed.weight, tensors["model.embed.weight"].bfloat16())


def test_tied_parameters_stay_one() -> None:
    model = meta_model(tied=True)
    load(model, entries(tied=True), MemoryCheckpoint(weights(tied=True)))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, weights(tied=True)["model.embed.weight"])
    model = meta_model(tied=True)
    load_dummy_weights(model, device="cpu", dtype=torch.float32)
    assert model.head.weight is model.embed.weight


def test_aliases_name_the_same_tensor() -> None:
    model, tensors = meta_model(), weights()
    tensors["embed.weight"] = tensors.pop("model.embed.weight")
    load(model, entries(), MemoryCheckpoint(tensors))
    assert torch.equal(model.embed.weight, tensors["embed.weight"])


def test_all_problems_are_reported_at_once_before_anything_is_allocated() -> None:
    model, tensors = meta_model(), weights()
    del tensors["model.embed.weight"], tensors["model.layers.0.q.weight"], tensors["model.layers.1.q.weight"]
    tensors["model.layers.1.norm.weight"] = torch.zeros(5)
    tensors["head.weight"] = torch.zeros(4, 10, dtype=torch.int32)
    tensors["extra"] = torch.zeros(1)
    for i in (0, 1, 2, 5):
        tensors[f"model.layers.{i}.x.weight"] = torch.zeros(1)
        tensors[f"model.layers.{i}.rotary_emb.inv_freq"] = torch.zeros(1)
        tensors[f"model.layers.{i}.mask"] = torch.zeros(1)
    checkpoint = MemoryCheckpoint(tensors)
    with pytest.raises(TacoValidationError) as caught:
        load(model, entries(), checkpoint, ignore=["model.layers.*.mask"])
    assert str(caught.value).splitlines()[1:] == [
        "3 tensors missing:",
        "  model.embed.weight",
        "  model.layers.[0-1].q.weight",
        "5 tensors not expected:",
        "  extra",
        "  model.layers.[0-2,5].x.weight",
        "1 tensor of a wrong shape:",
        "  model.layers.1.norm.weight: wanted [4], got [5]",
        "1 tensor not floating-point numbers (quantised checkpoints of this kind are not supported):",
        "  head.weight: stored as int32",
    ]
    assert all(param.is_meta for param in model.parameters())
    assert checkpoint.num_read == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda wanted: wanted[:-1], r"no entry fills head\.weight"),
        (lambda wanted: [*wanted, wanted[0]], r"several entries fill all of embed\.weight"),
        (lambda wanted: [e for e in wanted if e.name != "model.layers.0.k.weight"], "gaps or overlap"),
        (lambda wanted: [e for e in wanted if e.name != "model.layers.0.v.weight"], "gaps or overlap"),
        (lambda wanted: [e for e in wanted if e.name != "model.layers.0.q.weight"], "gap at its start"),
        (lambda wanted: [*wanted, WeightEntry("x", (4, 4), "layers.0.qkv.weight", dim=0, offset=2)], "gaps or overlap"),
        (lambda wanted: [*wanted, WeightEntry("x", (12, 1), "layers.0.qkv.weight", dim=1)], "different dimensions"),
        (lambda wanted: [*wanted[1:], WeightEntry("x", (9, 4), "embed.weight")], "does not fit"),
    ],
)
def test_entries_that_do_not_fill_every_parameter_once_are_a_bug(change: object, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        load(meta_model(), change(entries()), MemoryCheckpoint(weights()))


def test_dummy_weights_depend_on_seed_and_name_only() -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(models))
        models.append(meta_model())
        load_dummy_weights(models[-1], device="cpu", dtype=torch.float32, seed=seed)
    first, second, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert not torch.equal(first["layers.0.qkv.weight"], first["layers.1.qkv.weight"])
    assert models[0].table.is_meta


def test_dummy_weights_are_small_and_norms_about_one() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 4096, dtype=torch.float32), nn.LayerNorm(512))
    load_dummy_weights(model, device="cpu", dtype=torch.bfloat16)
    weight = model[0].weight.float()
    assert model[0].weight.dtype == torch.bfloat16
    assert abs(weight.mean()) < 1e-3 and abs(weight.std() - 0.02) < 1e-3
    assert len(weight.unique(dim=0)) == 4096  # no two rows are the same
    assert abs(model[1].weight.float().mean() - 1) < 0.01 and abs(model[1].bias.float().mean()) < 0.01
