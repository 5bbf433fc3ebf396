"""Attention of encoders: every token of a row sees all tokens of the row, or those in a window around it.

Rows are packed one after the other without padding. Nothing is cached, so keys and values are those of this step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from taco.kernels.dispatch import op
from taco.kernels.metadata import AttentionMetadata

WINDOW_SLICE = 256  # queries of a row that are attended together where a window hides most keys from them


@op
def encoder_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attention without a causal mask over the tokens of each row.

    Args:
        query, key, value: [T, num_heads, head_dim], possibly views of one projection.
        meta: of the batch; rows are whole texts, so only the starts of the rows are read.
        scale: factor on the dot products.
        window: a token sees those at most this many positions before and after it; None for all.

    Returns:
        [T, num_heads, head_dim], contiguous, in the dtype of `query`; scores and sums are float32.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for row in range(meta.num_rows):
        part = slice(int(meta.query_start_cpu[row]), int(meta.query_start_cpu[row + 1]))
        q, k, v = (x[part].float() for x in (query, key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k).mul_(scale)
        if window is not None:
            positions = torch.arange(len(q), device=query.device)
            scores.masked_fill_((positions[:, None] - positions).abs() > window, float("-inf"))
        out[part] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(query.dtype)
    return out


@encoder_attention.candidate("sdpa")
def encoder_attention_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Neighbouring rows of the same length are one call of torch's attention, so that nothing is padded.

    A batch that is sorted by length has few such groups. The result of a row does not depend on the others.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for start, count, length in _runs(meta):
        stop = start + count * length
        # [count, num_heads, length, head_dim], views
        q, k, v = (x[start:stop].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        target = out[start:stop].view(count, length, *out.shape[1:])
        if window is None or window >= length - 1:
            target.copy_(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2))
            continue
        for low in range(0, length, WINDOW_SLICE):
            high = min(low + WINDOW_SLICE, length)
            first, last = max(0, low - window), min(length, high + window)
            attended = F.scaled_dot_product_attention(
                q[:, :, low:high],
                k[:, :, first:last],
                v[:, :, first:last],
                _window_mask(meta, low - first, high - low, last - first, window, query.device),
                scale=scale,
            )
            target[:, low:high] = attended.transpose(1, 2)
    return out


def _runs(meta: AttentionMetadata) -> list[tuple[int, int, int]]:
    """Runs of rows of the same length: first token, number of rows, tokens of a row. Found once a step."""
    found: list[tuple[int, int, int]] | None = meta.cache.get("encoder runs")
    if found is None:
        found = meta.cache["encoder runs"] = list(_find_runs(meta.query_start_cpu.tolist()))
    return found


def _find_runs(starts: list[int]) -> Iterator[tuple[int, int, int]]:
    first = 0
    for row in range(1, len(starts)):
        length = starts[first + 1] - starts[first]
        if row == len(starts) - 1 or starts[row + 1] - starts[row] != length:
            yield starts[first], row - first, length
            first = row


def _window_mask(
    meta: AttentionMetadata, offset: int, num_queries: int, num_keys: int, window: int, device: torch.device
) -> torch.Tensor:
    """bool [num_queries, num_keys], True where query i, which stands at key i + offset, sees a key."""
    name = ("encoder window", offset, num_queries, num_keys, window)
    mask: torch.Tensor | None = meta.cache.get(name)
    if mask is None:
        positions = torch.arange(num_queries, device=device)[:, None] + offset
        mask = (positions - torch.arange(num_keys, device=device)).abs() <= window
        meta.cache[name] = mask
    return mask
