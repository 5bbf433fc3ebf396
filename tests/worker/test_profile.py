"""The step that is profiled on a GPU, here with a model of attention alone on a CPU, and without torch.cuda."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from taco.errors import OutOfMemoryError
from taco.kernels.attention import paged_attention, write_kv
from taco.models.loader.apply import load_dummy_weights
from taco.models.registry import resolve_model_class
from taco.worker import memory, profile
from tests.models.harness import tiny_config

CPU = torch.device("cpu")


class Alike(torch.nn.Module):
    """A layer of some kind."""

    def __init__(self, size: int, window: int | None, layer_idx: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))
        self.window, self.layer_idx, self.name = window, layer_idx, f"layers.{layer_idx}"


class AttentionModel:
    """Writes and attends as a model does, and keeps what it was given."""

    num_layers, num_kv_heads, head_dim, vocab_size = 3, 2, 8, 11

    def __init__(self):
        self.layers = [Alike(4, None, index) for index in range(self.num_layers)]
        self.batches, self.num_logits = [], []

    def __call__(self, ids, positions, kv_caches, meta):
        self.batches.append((ids, positions, meta))
        key = torch.ones(len(ids), self.num_kv_heads, self.head_dim)
        for _, (keys, values) in zip(self.layers, kv_caches, strict=True):
            assert len(keys) == 2  # the size of the cache does not matter
            write_kv(key, key, keys, values, meta)
            out = paged_attention(torch.ones(len(ids), 4, self.head_dim), keys, values, meta, 1.0)
        assert torch.isfinite(out).all()
        return out[:, 0]

    def compute_logits(self, hidden):
        self.num_logits.append(len(hidden))
        return torch.zeros(len(hidden), self.vocab_size)


def make_config(max_num_batched_tokens, max_model_len, max_num_seqs=100):
    return SimpleNamespace(
        cache_config=SimpleNamespace(block_size=4),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len, max_num_seqs=max_num_seqs
        ),
        model_config=SimpleNamespace(dtype=torch.float32, logits_processors=(), max_logprobs=20),
        watermark_config=None,
    )


@pytest.fixture
def cuda(monkeypatch):
    """Answers in place of torch.cuda."""
    fake = SimpleNamespace(
        synchronize=lambda device: None,
        reset_peak_memory_stats=lambda device: None,
        empty_cache=lambda: None,
        memory_allocated=lambda device: 1000,
        max_memory_allocated=lambda device: 1300,
    )
    monkeypatch.setattr(torch, "cuda", fake)


@pytest.mark.parametrize(
    ("tokens", "length", "num_seqs", "counts"),
    [
        (16, 50, 100, [16]),  # a chunk at the end of a long row
        (50, 50, 100, [50]),
        (20, 8, 100, [4, 8, 8]),  # more than a row has
        (17, 8, 100, [1, 8, 8]),
        (64, 8, 2, [8, 8]),  # more than all rows together have
        (3, 1, 100, [1, 1, 1]),
    ],
)
def test_the_step_is_as_large_as_a_step_can_be(cuda, tokens, length, num_seqs, counts):
    model = AttentionModel()
    assert profile.worst_case_bytes(make_config(tokens, length, num_seqs), model, CPU) == 300
    decoding = [1] * min(num_seqs, sum(counts))
    for (ids, positions, meta), num_tokens in zip(model.batches, (counts, decoding), strict=True):
        assert meta.query_start.tolist() == [sum(num_tokens[:i]) for i in range(len(num_tokens) + 1)]
        assert meta.query_start.tolist() == meta.query_start_cpu.tolist()
        assert len(ids) == meta.num_tokens == sum(num_tokens)
        assert meta.seq_lens.tolist() == meta.seq_lens_cpu.tolist() == [length] * len(num_tokens)
        assert meta.num_decode_rows == num_tokens.count(1)
        assert positions.tolist() == [position for n in num_tokens for position in range(length - n, length)]


def test_logits_are_those_of_one_slice(cuda, monkeypatch):
    monkeypatch.setattr(memory, "logits_rows", lambda vocab_size, device, least: 5)
    for tokens, rows in ((3, 3), (16, 5)):
        model = AttentionModel()
        profile.worst_case_bytes(make_config(tokens, 50), model, CPU)
        assert model.num_logits == [rows, rows]


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ([(4, None)], [0]),
        ([(4, None)] * 2, [0, 1]),
        ([(4, None)] * 9, [0, 0]),
        ([(4, 7), (4, 7), (4, None)] * 4, [0, 2, 0, 2]),
        ([(4, 7), (5, 7), (4, None), (4, 7)], [0, 1, 2, 3]),
        ([(4, 7), (5, 7), (4, 7), (4, 7), (4, 7)], [0, 1, 0, 1]),
    ],
)
def test_two_layers_of_each_kind_are_run(settings, chosen):
    model = AttentionModel()
    layers = model.layers = [Alike(*kind, index) for index, kind in enumerate(settings)]
    with profile._few_layers(model) as count:
        assert [layer.layer_idx for layer in model.layers] == chosen and count == len(chosen)
    assert model.layers is layers


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt", "modernbert"])
def test_the_layers_of_a_model_are_as_many_kinds_as_it_has(name):
    config = tiny_config(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 12})
    with torch.device("meta"):
        model = resolve_model_class(config)(config)
    kinds = {profile._kind(layer) for layer in model.layers}
    few = {"llama": 1, "gemma3_text": 2, "gpt2": 1, "opt": 1, "modernbert": 3}[name]  # one has no norm
    assert len(model.layers) == 12 and len(kinds) == few


def test_a_step_that_does_not_fit_names_arguments_to_try(cuda, monkeypatch):
    def fail(self, hidden):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AttentionModel, "compute_logits", fail)
    with pytest.raises(OutOfMemoryError, match=r"max_num_batched_tokens \(it is 16\) or max_model_len \(it is 50\)"):
        profile.worst_case_bytes(make_config(16, 50), AttentionModel(), CPU)


def test_the_largest_step_of_an_encoder_runs(cuda):
    config = tiny_config("bert")
    config.architectures = ["BertModel"]
    with torch.device("meta"):
        model = resolve_model_class(config)(config)
    load_dummy_weights(model, device=CPU, dtype=torch.float32)
    model.finalize()
    assert profile.worst_case_bytes(make_config(200, 96), model, CPU) == 300
