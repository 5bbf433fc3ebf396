"""Attention of encoders: every implementation against the plain reference, and that against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from taco.kernels import encoder_attention as module
from taco.kernels.encoder_attention import encoder_attention
from taco.kernels.metadata import AttentionMetadata, Workspace

CANDIDATES = [name for name in encoder_attention.names if name != "reference"]
LENGTHS = {
    "alone": [7],
    "equal": [5, 5, 5],
    "mixed": [3, 3, 9, 1, 1, 1, 9, 20],
    "ones": [1, 1],
    "long": [300, 300, 17],
}


def metadata(lengths: list[int]) -> AttentionMetadata:
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    lens = np.array(lengths, np.int32)
    empty = torch.empty(0)
    return AttentionMetadata(empty, empty, empty, empty, starts, lens, 0, 1, Workspace("cpu"))


def heads(lengths: list[int], dtype: torch.dtype, num_heads: int = 3, head_dim: int = 8) -> list[torch.Tensor]:
    """Views of one projection, as layers have them."""
    generator = torch.Generator().manual_seed(sum(lengths))
    fused = torch.randn(sum(lengths), 3 * num_heads, head_dim, generator=generator).to(dtype)
    return list(fused.split(num_heads, 1))


@pytest.mark.parametrize("window", [None, 0, 4, 64])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_equal_the_reference(name: str, dtype: torch.dtype, lengths: list[int], window: int | None) -> None:
    query, key, value = heads(lengths, dtype)
    with encoder_attention.forced("reference"):
        expected = encoder_attention(query, key, value, metadata(lengths), 0.3, window)
    with encoder_attention.forced(name):
        actual = encoder_attention(query, key, value, metadata(lengths), 0.3, window)
    if actual is NotImplemented:
        pytest.skip(f"{name} declines")
    assert actual.is_contiguous() and actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_reference_is_attention_within_rows() -> None:
    lengths = [4, 6]
    query, key, value = heads(lengths, torch.float32)
    with encoder_attention.forced("reference"):
        out = encoder_attention(query, key, value, metadata(lengths), 0.5)
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    expected = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), scale=0.5).transpose(0, 1) for part in parts
    ]
    torch.testing.assert_close(out, torch.cat(expected))


def test_reference_sees_no_further_than_the_window() -> None:
    query, key, value = heads([9], torch.float32)
    with encoder_attention.forced("reference"):
        out = encoder_attention(query, key, value, metadata([9]), 0.5, 2)
        value[3] += 100
        changed = encoder_attention(query, key, value, metadata([9]), 0.5, 2) - out
    assert [bool(row.abs().max() > 0.1) for row in changed] == [False] + [True] * 5 + [False] * 3


@pytest.mark.parametrize("name", CANDIDATES)
def test_slices_of_queries_and_neighbours_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [30, 30, 12]
    query, key, value = heads(lengths, torch.float32)
    with encoder_attention.forced(name):
        whole = encoder_attention(query, key, value, metadata(lengths), 0.3, 5)
        alone = encoder_attention(query[30:60], key[30:60], value[30:60], metadata([30]), 0.3, 5)
        monkeypatch.setattr(module, "WINDOW_SLICE", 7)
        sliced = encoder_attention(query, key, value, metadata(lengths), 0.3, 5)
    torch.testing.assert_close(alone, whole[30:60], atol=1e-6, rtol=0)
    torch.testing.assert_close(sliced, whole, atol=1e-6, rtol=0)
