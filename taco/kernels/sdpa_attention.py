"""Paged attention and KV writes out of batched torch operations, for devices that have no kernels of their own.

The queries of each row are cut into slices; a decoding row is a slice of one query. Slices of similar size are attended
together: their keys are gathered into one dense tensor, and one call of `scaled_dot_product_attention` does the rest,
with a mask over what a query may not see. torch's memory-efficient kernel makes no scores in memory, and it handles
each query alone and its keys in order, so that the result of a row does not depend on its group; where that kernel
does not fit, torch takes plain products.

Nothing here waits for the device: sizes and indices are made on the host, and reach the device in one copy a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from taco.kernels.attention import paged_attention, write_kv
from taco.kernels.cpu_attention import Slices, cut_queries
from taco.kernels.metadata import AttentionMetadata
from taco.kernels.sdpa_backends import only

QUERY_SLICE = 512  # queries of a slice at most
GATHER_BYTES = 128 << 20  # keys gathered at a time, where one slice alone does not need more; values take as much again
MASK_BYTES = 64 << 20  # mask of a group at most, where one query alone does not need more


@write_kv.candidate("lines")
def write_kv_lines(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    meta: AttentionMetadata,
) -> None:
    """One row copy a token and head, at indices that all layers of the step share."""
    num_kv_heads, size, head_dim = key_cache.shape[1:]
    lines = meta.cache.get(("lines", num_kv_heads))
    if lines is None:
        first = meta.slot_mapping // size * (num_kv_heads * size) + meta.slot_mapping % size
        lines = (first[:, None] + torch.arange(num_kv_heads, device=key.device) * size).flatten()
        meta.cache["lines", num_kv_heads] = lines
    key_cache.view(-1, head_dim).index_copy_(0, lines, key.reshape(-1, head_dim))
    value_cache.view(-1, head_dim).index_copy_(0, lines, value.reshape(-1, head_dim))
    return None


@paged_attention.candidate("sdpa")
def paged_attention_sdpa(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Gathers keys and values of groups of rows within a fixed amount of memory."""
    key = ("sdpa", *query.shape[1:], key_cache.shape[1], sliding_window)
    groups = meta.cache.get(key)
    if groups is None:
        groups = meta.cache[key] = list(_make_groups(meta, query, key_cache, sliding_window))
    out = torch.empty_like(query)
    with only([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        for group in groups:
            group.attend(out, query, key_cache, value_cache, scale)
    return out


def _make_groups(
    meta: AttentionMetadata, query: torch.Tensor, key_cache: torch.Tensor, window: int | None
) -> Iterator[_Group]:
    """What all layers with the same heads and window share in one step."""
    num_kv_heads = key_cache.shape[1]
    key_bytes = query.shape[1] // num_kv_heads * query.itemsize  # of the mask, for one query and one key
    max_queries = MASK_BYTES // (int(meta.seq_lens_cpu.max()) * key_bytes)
    slices = cut_queries(meta, window, max(1, min(QUERY_SLICE, max_queries)))
    groups, arrays = [], []
    order = np.lexsort((slices.spans, slices.counts))
    while len(order):
        size = _group_size(slices.select(order), key_cache[0].nbytes, meta.block_size * key_bytes)
        group = slices.select(np.sort(order[:size]))
        groups.append(group)
        arrays += _index_arrays(group)
        order = order[size:]
    flat = torch.from_numpy(np.concatenate(arrays))
    if query.device.type != "cpu":
        flat = flat.pin_memory().to(query.device, non_blocking=True)
    indices = flat.split([len(array) for array in arrays])
    for number, group in enumerate(groups):
        yield _Group(meta, group, indices[number * NUM_ARRAYS :][:NUM_ARRAYS], query, num_kv_heads, window)


def _group_size(slices: Slices, block_bytes: int, block_mask_bytes: int) -> int:
    """How many of the first slices, which are sorted by counts and spans, are attended together."""
    sizes = np.arange(1, len(slices.rows) + 1)
    most = np.maximum.accumulate(slices.spans)
    fits = (
        (sizes * most * block_bytes <= GATHER_BYTES)
        & (sizes * most * slices.counts * block_mask_bytes <= MASK_BYTES)
        # Padding to the largest wastes little.
        & (slices.counts <= 1.25 * slices.counts[0])
        & (most <= 2 * np.minimum.accumulate(slices.spans) + 4)
    )
    fits[0] = True
    return int(np.argmin(fits)) if not fits.all() else len(fits)


NUM_ARRAYS = 7


def _index_arrays(slices: Slices) -> list[np.ndarray]:
    """int64 arrays: rows, counts, positions and firsts of the slices; the tokens of the queries, of these the ones that
    are kept, and their tokens. Short slices repeat their last query, and what is computed for it is dropped."""
    places = np.arange(slices.counts.max())
    tokens = (slices.starts[:, None] + np.minimum(places, slices.counts[:, None] - 1)).reshape(-1)
    kept = np.flatnonzero(places < slices.counts[:, None])
    parts = (slices.rows, slices.counts, slices.positions, slices.firsts)
    return [part.astype(np.int64) for part in (*parts, tokens, kept, tokens[kept])]


class _Group:
    """b slices that are attended together, of T queries and n keys each; the G query heads of a key head, T queries
    each, are the queries of one problem."""

    def __init__(
        self,
        meta: AttentionMetadata,
        slices: Slices,
        indices: tuple[torch.Tensor, ...],
        query: torch.Tensor,
        num_kv_heads: int,
        window: int | None,
    ) -> None:
        self.num_slices, self.num_queries = len(slices.rows), int(slices.counts.max())
        self.width = int(slices.spans.max())  # in blocks
        self.num_kv_heads, self.group = num_kv_heads, query.shape[1] // num_kv_heads
        self.is_padded = bool((slices.counts < self.num_queries).any())
        *self.parts, self.tokens, self.kept, self.kept_tokens = indices
        self.block_tables, self.block_size, self.window = meta.block_tables, meta.block_size, window
        # What says which keys are gathered and seen is kept for a step of decoding. For slices of prompts it may be
        # large, and is made in each layer.
        self.found = self._find_keys(query.dtype) if self.num_queries == 1 else None

    def _find_keys(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Block-heads to gather, int32 [b * num_kv_heads * width], and the mask to add, [b, 1, G * T, n]."""
        rows, counts, positions, firsts = (part[:, None] for part in self.parts)
        device = rows.device
        columns = firsts + torch.arange(self.width, device=device)
        # Columns past the keys of a slice are of no interest: what is there is masked.
        blocks = self.block_tables[rows, columns.clamp(max=self.block_tables.shape[1] - 1)]
        heads = torch.arange(self.num_kv_heads, dtype=torch.int32, device=device)
        lines = (blocks[:, None] * self.num_kv_heads + heads[:, None]).flatten()

        keys = firsts * self.block_size + torch.arange(self.width * self.block_size, device=device)
        queries = positions + torch.arange(self.num_queries, device=device).minimum(counts - 1)
        keys, queries = keys[:, None], queries[:, :, None]
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None].expand(-1, self.group, -1, -1).reshape(self.num_slices, 1, -1, hidden.shape[-1])
        return lines, mask

    def attend(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scale: float,
    ) -> None:
        lines, mask = self.found or self._find_keys(query.dtype)
        _, num_heads, head_dim = query.shape
        shape = (self.num_slices, self.num_kv_heads, -1, head_dim)
        keys, values = (
            cache.view(-1, cache.shape[2] * head_dim).index_select(0, lines).view(shape).to(query.dtype)
            for cache in (key_cache, value_cache)
        )
        q = query.index_select(0, self.tokens)
        q = q.view(self.num_slices, self.num_queries, self.num_kv_heads, self.group, head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(shape)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        attended = attended.unflatten(2, (self.group, self.num_queries)).permute(0, 3, 1, 2, 4)
        attended = attended.reshape(-1, num_heads, head_dim)
        if self.is_padded:
            attended = attended.index_select(0, self.kept)
        out.index_copy_(0, self.kept_tokens, attended)
