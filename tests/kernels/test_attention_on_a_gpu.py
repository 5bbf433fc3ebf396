"""Attention on a device against the references on the CPU, with the types and sizes of heads for which torch has
different kernels there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from taco.kernels.attention import paged_attention, write_kv
from taco.kernels.encoder_attention import encoder_attention
from taco.kernels.metadata import AttentionMetadata, Workspace
from tests.kernels.test_attention import make_batch
from tests.kernels.test_encoder_attention import heads, metadata
from tests.simulated_cuda import simulated_and_real_cuda  # noqa: F401

pytestmark = pytest.mark.usefixtures("simulated_and_real_cuda")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [12, 64, 96, 256])  # of 12 flash attention has none in 16 bits
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}


def on_device(meta: AttentionMetadata) -> AttentionMetadata:
    parts = ("query_start", "seq_lens", "block_tables", "slot_mapping")
    copies = {name: getattr(meta, name).cuda() for name in parts}
    return replace(meta, **copies, workspace=Workspace("cuda"), cache={})


@pytest.mark.parametrize("window", [None, 40])
@HEAD_DIMS
@DTYPES
def test_paged_attention(dtype: torch.dtype, head_dim: int, window: int | None) -> None:
    rows = [(1, 100), (1, 7), (1, 1), (40, 90), (33, 33)]
    query, key, value, key_cache, value_cache, meta = make_batch(
        rows, block_size=16, num_heads=6, num_kv_heads=2, head_dim=head_dim, dtype=dtype
    )
    scale = head_dim**-0.5
    keys, values = key_cache.cuda(), value_cache.cuda()
    there = on_device(meta)
    write_kv(key.cuda(), value.cuda(), keys, values, there)
    write_kv.reference(key, value, key_cache, value_cache, meta)
    assert torch.equal(keys.cpu(), key_cache) and torch.equal(values.cpu(), value_cache)
    ours = paged_attention(query.cuda(), keys, values, there, scale, window).cpu()
    exact = paged_attention.reference(query.float(), key_cache.float(), value_cache.float(), meta, scale, window)
    assert ours.dtype == dtype
    assert (ours.float() - exact).abs().max() < TOLERANCES[dtype]


@pytest.mark.parametrize("window", [None, 4])
@HEAD_DIMS
@DTYPES
def test_encoder_attention(dtype: torch.dtype, head_dim: int, window: int | None) -> None:
    lengths = [3, 3, 9, 1, 1, 300, 300, 17]
    query, key, value = heads(lengths, dtype, head_dim=head_dim)
    scale = head_dim**-0.5
    exact = encoder_attention.reference(query.float(), key.float(), value.float(), metadata(lengths), scale, window)
    fused = torch.cat((query, key, value), 1).cuda()
    ours = encoder_attention(*fused.split(query.shape[1], 1), metadata(lengths), scale, window).cpu()
    assert ours.dtype == dtype
    assert (ours.float() - exact).abs().max() < TOLERANCES[dtype]


def test_cudnn_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return original(*args, **kwargs)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for window in (None, 4):
        parts = [part.cuda() for part in heads([9, 9, 30], torch.float32)]
        encoder_attention(*parts, metadata([9, 9, 30]), 0.3, window)
    assert len(asked) > 3 and not any(asked)


def test_caches_of_more_than_2_to_the_31_numbers() -> None:
    query, key, value, key_cache, value_cache, meta = make_batch(
        [(1, 100), (1, 7), (40, 90)], block_size=16, num_heads=6, num_kv_heads=2, head_dim=64, dtype=torch.float16
    )
    is_large = torch.cuda.mem_get_info()[1] > 40 << 30  # the simulated device is not
    offset = (1 << 31) // key_cache[0].numel() if is_large else 50
    caches = []
    for part in (key_cache, value_cache):
        cache = torch.zeros(offset + len(part), *part.shape[1:], dtype=part.dtype, device="cuda")
        cache[offset:].copy_(part)
        caches.append(cache)
    there = on_device(meta)
    there.block_tables += offset
    there.slot_mapping += offset * meta.block_size
    write_kv(key.cuda(), value.cuda(), *caches, there)
    write_kv.reference(key, value, key_cache, value_cache, meta)
    for part, cache in zip((key_cache, value_cache), caches, strict=True):
        assert torch.equal(cache[offset:].cpu(), part) and not cache[:offset].any()
    ours = paged_attention(query.cuda(), *caches, there, 0.125).cpu()
    exact = paged_attention.reference(query.float(), key_cache.float(), value_cache.float(), meta, 0.125)
    assert (ours.float() - exact).abs().max() < TOLERANCES[torch.float16]
