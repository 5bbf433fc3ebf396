"""Paged attention on the CPU, out of library matrix products.

Two things decide the speed. Scratch memory is reused, because fresh pages cost more than the work done in them. And the
cache is gathered without repeating key heads: the query heads of a group become the rows of one matrix instead.

- Rows with one query token are taken in groups of similar length. Their keys are gathered into a dense tensor
  [rows * num_kv_heads, keys, head_dim] and attended by two batched products; padding is masked.
- Rows with more tokens go one by one through `scaled_dot_product_attention`, a slice of queries at a time: masks stay
  small, and keys in the future of a slice are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from taco.kernels.attention import paged_attention, write_kv
from taco.kernels.metadata import AttentionMetadata

GATHER_BYTES = 4 << 20  # keys gathered at a time for rows with one token: with the values they stay in the last cache
QUERY_SLICE = 256  # queries of one row attended at a time when a mask is needed
MASK_CACHE_ELEMENTS = 8 << 20  # masks kept for all layers of a step; larger ones are made anew in each layer


@write_kv.candidate("cpu")
def write_kv_cpu(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    meta: AttentionMetadata,
) -> None:
    """One row copy a token and head, at indices that all layers of the step share."""
    if key.device.type != "cpu":
        return NotImplemented
    num_kv_heads, size, head_dim = key_cache.shape[1:]
    lines = meta.cache.get(("lines", num_kv_heads))
    if lines is None:
        slots = meta.slot_mapping.numpy()
        first = slots // size * (num_kv_heads * size) + slots % size
        lines = torch.from_numpy((first[:, None] + np.arange(num_kv_heads) * size).reshape(-1))
        meta.cache["lines", num_kv_heads] = lines
    key_cache.view(-1, head_dim).index_copy_(0, lines, key.reshape(-1, head_dim))
    value_cache.view(-1, head_dim).index_copy_(0, lines, value.reshape(-1, head_dim))
    return None


@paged_attention.candidate("cpu")
def paged_attention_cpu(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Gathers blocks into scratch memory and uses dense products; scores of 16-bit rows are rounded to 16 bits."""
    if query.device.type != "cpu":
        return NotImplemented
    num_kv_heads = key_cache.shape[1]
    plan = meta.cache.get(("cpu", num_kv_heads, sliding_window))
    if plan is None:
        plan = _Plan.make(meta, num_kv_heads, key_cache.shape[3] * key_cache.element_size(), sliding_window)
        meta.cache["cpu", num_kv_heads, sliding_window] = plan
    out = torch.empty_like(query)
    for group in plan.groups:
        _attend_group(out, query, key_cache, value_cache, meta, group, scale)
    for prompt in plan.prompts:
        _attend_prompt(out, query, key_cache, value_cache, meta, prompt, scale, sliding_window)
    return out


@dataclass
class _Group:
    """Rows with one query token each, attended together: b = rows * num_kv_heads problems of n keys.

    tokens: int64 [r], their token (= row) numbers, or None if they are all rows in order. lines: int64 [b * blocks],
    the block-heads to gather. hidden: bool [b, 1, n], or None. scratch: see `_scratch_of`.
    """

    num_rows: int
    num_blocks: int
    tokens: torch.Tensor | None
    lines: torch.Tensor
    hidden: torch.Tensor | None
    scratch: tuple[torch.Tensor, ...] | None = None


@dataclass
class _Prompt:
    """One row with several query tokens. lines: int64 [num_kv_heads * blocks] from block `first_block` on."""

    start: int
    stop: int
    num_keys: int
    first_block: int
    lines: torch.Tensor
    masks: dict[int, torch.Tensor]  # by first query of the slice
    keep_masks: bool


@dataclass
class _Plan:
    """What all layers with the same heads and window share in one step."""

    groups: list[_Group]
    prompts: list[_Prompt]

    @classmethod
    def make(cls, meta: AttentionMetadata, num_kv_heads: int, line_bytes: int, window: int | None) -> _Plan:
        tables = meta.block_tables.numpy()
        size = meta.block_size
        heads = np.arange(num_kv_heads)
        lens = meta.seq_lens_cpu.astype(np.int64)
        num_blocks = -(-lens // size)

        groups = []
        count = meta.num_decode_rows
        if count:
            first = np.zeros(count, np.int64) if window is None else np.maximum(0, lens[:count] - window) // size
            spans = num_blocks[:count] - first
            order = np.argsort(spans, kind="stable")
            bytes_of_block = num_kv_heads * size * line_bytes
            begin = 0
            while begin < count:
                end = (
                    begin + 1
                )  # as many rows as fit the scratch memory when padded to the longest, and to little waste
                while (
                    end < count
                    and (end + 1 - begin) * spans[order[end]] * bytes_of_block <= GATHER_BYTES
                    and spans[order[end]] <= 2 * spans[order[begin]] + 4
                ):
                    end += 1
                rows = order[begin:end]
                groups.append(_make_group(tables, lens, first, spans, rows, count, size, heads, window))
                begin = end

        prompts = []
        kept = 0
        for row in range(count, meta.num_rows):
            start, stop = int(meta.query_start_cpu[row]), int(meta.query_start_cpu[row + 1])
            num_keys = int(lens[row])
            context = num_keys - (stop - start)
            first_block = 0 if window is None else max(0, context + 1 - window) // size
            blocks = tables[row, first_block : num_blocks[row]].astype(np.int64)
            lines = torch.from_numpy((blocks[None, :] * num_kv_heads + heads[:, None]).reshape(-1))
            kept += (stop - start) * num_keys
            prompts.append(_Prompt(start, stop, num_keys, first_block, lines, {}, kept <= MASK_CACHE_ELEMENTS))
        return cls(groups, prompts)


def _make_group(
    tables: np.ndarray,
    lens: np.ndarray,
    first: np.ndarray,
    spans: np.ndarray,
    rows: np.ndarray,
    num_decode_rows: int,
    size: int,
    heads: np.ndarray,
    window: int | None,
) -> _Group:
    rows = np.sort(rows)
    width = int(spans[rows].max())
    columns = first[rows, None] + np.arange(width)
    inside = np.arange(width) < spans[rows, None]
    blocks = np.where(inside, tables[rows[:, None], np.minimum(columns, tables.shape[1] - 1)], 0).astype(np.int64)
    lines = (blocks[:, None, :] * len(heads) + heads[:, None]).reshape(-1)
    positions = first[rows, None] * size + np.arange(width * size)
    hidden = positions >= lens[rows, None]
    if window is not None:
        hidden |= positions < lens[rows, None] - window
    mask = torch.from_numpy(np.repeat(hidden, len(heads), axis=0)[:, None, :]) if hidden.any() else None
    tokens = None if len(rows) == num_decode_rows else torch.from_numpy(rows)
    return _Group(len(rows), width, tokens, torch.from_numpy(lines), mask)


def _gather(
    cache: torch.Tensor, name: str, lines: torch.Tensor, shape: tuple[int, int, int], meta: AttentionMetadata
) -> torch.Tensor:
    num_blocks, num_kv_heads, size, head_dim = cache.shape
    buffer = meta.workspace.take(name, (lines.shape[0], size * head_dim), cache.dtype)
    torch.index_select(cache.view(num_blocks * num_kv_heads, size * head_dim), 0, lines, out=buffer)
    return buffer.view(shape)


def _scratch_of(group: _Group, query: torch.Tensor, key_cache: torch.Tensor, meta: AttentionMetadata) -> tuple:
    """Views of the workspace in all the shapes a group needs, made once a step: with few rows making them costs as much
    as the work itself. Keys and values by line [b * blocks, block_size * head_dim], keys transposed [b, head_dim, n],
    values [b, n, head_dim], scores [b, group, n]."""
    num_kv_heads, size, head_dim = key_cache.shape[1:]
    batch, num_keys = group.num_rows * num_kv_heads, group.num_blocks * size
    take = meta.workspace.take
    keys, values = (take(name, (len(group.lines), size * head_dim), query.dtype) for name in ("keys", "values"))
    scores = take("scores", (batch, query.shape[1] // num_kv_heads, num_keys), query.dtype)
    dense = (batch, num_keys, head_dim)
    return keys, values, keys.view(dense).transpose(1, 2), values.view(dense), scores


def _attend_group(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    meta: AttentionMetadata,
    group: _Group,
    scale: float,
) -> None:
    if group.scratch is None:
        group.scratch = _scratch_of(group, query, key_cache, meta)
    key_lines, value_lines, keys, values, scores = group.scratch
    torch.index_select(key_cache.view(-1, key_lines.shape[1]), 0, group.lines, out=key_lines)
    torch.index_select(value_cache.view(-1, value_lines.shape[1]), 0, group.lines, out=value_lines)
    q = query[: group.num_rows] if group.tokens is None else query.index_select(0, group.tokens)
    q = (q * scale).view(len(scores), -1, keys.shape[1])
    torch.bmm(q, keys, out=scores)
    if group.hidden is not None:
        scores.masked_fill_(group.hidden, float("-inf"))
    weights = torch.softmax(scores, -1)  # sums in float32 inside, also for 16-bit scores
    if group.tokens is None:
        torch.bmm(weights, values, out=out[: group.num_rows].view_as(q))
    else:
        out.index_copy_(0, group.tokens, torch.bmm(weights, values).view(group.num_rows, *out.shape[1:]))


def _attend_prompt(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    meta: AttentionMetadata,
    prompt: _Prompt,
    scale: float,
    window: int | None,
) -> None:
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key_cache.shape[1]
    group = num_heads // num_kv_heads
    shape = (num_kv_heads, prompt.lines.shape[0] // num_kv_heads * meta.block_size, head_dim)
    k = _gather(key_cache, "keys", prompt.lines, shape, meta)
    v = _gather(value_cache, "values", prompt.lines, shape, meta)
    offset = prompt.first_block * meta.block_size  # position of the first gathered key
    num_queries = prompt.stop - prompt.start
    context = prompt.num_keys - num_queries
    plain = context == 0 and (window is None or num_queries <= window)
    step = num_queries if plain else QUERY_SLICE
    for begin in range(0, num_queries, step):
        end = min(begin + step, num_queries)
        low = max(0, context + begin + 1 - window - offset) if window is not None else 0
        high = context + end - offset
        mask = None
        if not plain:
            mask = prompt.masks.get(begin)
            if mask is None:
                position = torch.arange(context + begin, context + end)[:, None]
                key_position = torch.arange(low + offset, high + offset)[None, :]
                hidden = key_position > position
                if window is not None:
                    hidden |= key_position <= position - window
                mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
                if prompt.keep_masks:
                    prompt.masks[begin] = mask
        tokens = slice(prompt.start + begin, prompt.start + end)
        q = query[tokens].view(end - begin, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(
            q,
            k[:, None, low:high].expand(-1, group, -1, -1),
            v[:, None, low:high].expand(-1, group, -1, -1),
            attn_mask=mask,
            is_causal=plain,
            scale=scale,
        )
        out[tokens].view(end - begin, num_kv_heads, group, head_dim).copy_(attended.permute(2, 0, 1, 3))
