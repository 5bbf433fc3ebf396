"""Attention of encoders: every token of a row sees all tokens of the row, or those in a window around it.

Rows are packed one after the other without padding. Nothing is cached, so keys and values are those of this step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from taco.kernels.dispatch import op
from taco.kernels.metadata import AttentionMetadata
from taco.kernels.sdpa_backends import only

MAX_DENSE_LENGTH = 1024  # tokens of a row whose scores are all made at once
SCORE_BYTES = 1 << 20  # scores made at a time in bfloat16, where a single row does not need more
# Not cuDNN: it makes a plan on the host for each new shape, and few steps have the same shapes.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
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


@encoder_attention.candidate("runs")
def encoder_attention_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Neighbouring rows of the same length are computed together, so that nothing is padded.

    A batch that is sorted by length has few such runs. The result of a row does not depend on the others.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    with only(BACKENDS) if query.is_cuda else nullcontext():
        for start, count, length in _runs(meta):
            stop = start + count * length
            # [count, length, num_heads, head_dim], views
            q, k, v, target = (x[start:stop].view(count, length, *x.shape[1:]) for x in (query, key, value, out))
            if window is not None and window < length - 1:
                _attend_in_window(q, k, v, target, scale, window, meta)
            elif query.device.type == "cpu" and query.dtype == torch.bfloat16 and length <= MAX_DENSE_LENGTH:
                _attend_densely(q, k, v, target, scale)
            else:
                _attend(q, k, v, target, scale)
    return out


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> None:
    """torch's own attention; all tensors are [count, length, num_heads, head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out.copy_(F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2))


def _attend_densely(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, scale: float
) -> None:
    """Batched products on copies in which heads stand apart: twice as fast as torch's attention in bfloat16 on a CPU,
    whose scores are rounded to bfloat16 here."""
    count, length, num_heads, head_dim = query.shape
    step = max(1, SCORE_BYTES // (2 * num_heads * length * length))
    for low in range(0, count, step):
        part = slice(low, low + step)
        q, k, v = (x[part].transpose(1, 2).reshape(-1, length, head_dim) for x in (query, key, value))
        weights = torch.bmm(q.mul_(scale), k.transpose(1, 2)).softmax(-1)
        out[part] = torch.bmm(weights, v).view(-1, num_heads, length, head_dim).transpose(1, 2)


def _attend_in_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int,
    meta: AttentionMetadata,
) -> None:
    """Slices of queries with the keys that any of them sees."""
    length = query.shape[1]
    for low in range(0, length, WINDOW_SLICE):
        high = min(low + WINDOW_SLICE, length)
        first, last = max(0, low - window), min(length, high + window)
        mask = _window_mask(meta, low - first, high - low, last - first, window, query.device)
        _attend(query[:, low:high], key[:, first:last], value[:, first:last], out[:, low:high], scale, mask)


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
