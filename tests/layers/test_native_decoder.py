from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from taco.kernels import native
from taco.layers.decoder import DecoderLayer, DecoderLayerConfig, decoder_layer
from taco.layers.rotary import RotaryEmbedding
from tests.kernels.test_attention import make_batch

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels here")

BASE = DecoderLayerConfig(
    hidden_size=48,
    intermediate_size=80,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    activation="silu",
    eps=1e-5,
)
CONFIGS = {
    "llama": BASE,
    "biases": replace(BASE, qkv_bias=True, output_bias=True, mlp_bias=True),
    "window": replace(BASE, sliding_window=20),
    "gemma": replace(
        BASE, qk_norm=True, sandwich_norm=True, norm_plus_one=True, activation="gelu_pytorch_tanh", scale=0.1
    ),
    "one head, odd sizes": replace(BASE, hidden_size=38, intermediate_size=34, num_heads=1, num_kv_heads=1, head_dim=6),
}
ROWS = [(1, 1), (1, 30), (1, 70), (5, 5), (40, 100), (300, 310)]


def make_layer(config: DecoderLayerConfig, dtype: torch.dtype) -> DecoderLayer:
    rotary = RotaryEmbedding(
        LlamaConfig(hidden_size=config.head_dim, num_attention_heads=1, max_position_embeddings=512), config.head_dim
    )
    rotary.finalize(torch.device("cpu"), 512)
    layer = DecoderLayer(0, "layer", config, rotary)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.2).to(dtype)
    for module in layer.modules():
        if hasattr(module, "finalize") and module is not rotary:
            module.finalize()
    return layer


def run(layer, config, dtype, name, *, add_first, rows=ROWS):
    batch = make_batch(
        rows, block_size=16, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        dtype=dtype,
    )  # fmt: skip
    *_, key_cache, value_cache, meta = batch
    lens, starts = meta.seq_lens_cpu, meta.query_start_cpu
    counts = starts[1:] - starts[:-1]
    positions = torch.cat([torch.arange(n - c, n) for n, c in zip(lens.tolist(), counts.tolist(), strict=True)])
    torch.manual_seed(1)
    x = torch.randn(len(positions), config.hidden_size).to(dtype)
    residual = torch.randn_like(x) if add_first else None
    with decoder_layer.forced(name):
        out = decoder_layer(layer, x, residual, positions, (key_cache, value_cache), meta)
    return (*out, key_cache, value_cache)


@pytest.mark.parametrize("add_first", [True, False])
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_one_call_is_the_composition_of_the_operations(config, dtype, instruction_set, add_first) -> None:
    layer = make_layer(config, dtype)
    with native.forced(instruction_set):
        found = run(layer, config, dtype, "native", add_first=add_first)
    expected = run(layer, config, dtype, "reference", add_first=add_first)
    tolerance = {"atol": 3e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.06}
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone(dtype) -> None:
    layer = make_layer(BASE, dtype)
    whole = run(layer, BASE, dtype, "native", add_first=False)
    # The first row of the batch is drawn first, so it is the same in a batch of its own.
    alone = run(layer, BASE, dtype, "native", add_first=False, rows=ROWS[:1])
    assert torch.equal(alone[0][:1], whole[0][:1])


def test_new_weights_are_noticed() -> None:
    layer = make_layer(BASE, torch.float32)
    before = run(layer, BASE, torch.float32, "native", add_first=False)[0]
    fresh = make_layer(replace(BASE, mlp_bias=True), torch.float32)
    layer.attention.qkv.weight = fresh.attention.qkv.weight
    layer.mlp.down.weight = fresh.mlp.down.weight
    after = run(layer, BASE, torch.float32, "native", add_first=False)[0]
    expected = run(layer, BASE, torch.float32, "reference", add_first=False)[0]
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(after, expected, atol=3e-5, rtol=1e-4)


def test_layers_that_are_not_covered_are_declined() -> None:
    layer = make_layer(BASE, torch.float32)
    layer.attention.rotary = None
    x = torch.randn(1, 48)
    with decoder_layer.forced("native"), pytest.raises(NotImplementedError, match="decoder_layer"):
        decoder_layer(layer, x, None, torch.zeros(1, dtype=torch.int64), (x, x), None)
