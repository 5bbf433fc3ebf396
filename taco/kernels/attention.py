"""Attention over the paged KV cache: the operations and their plain-torch references.

Cache layout: keys and values are [num_blocks, num_kv_heads, block_size, head_dim] (see `AttentionMetadata`).
"""

from __future__ import annotations

import torch

from taco.kernels.dispatch import op
from taco.kernels.metadata import AttentionMetadata

SCORE_BYTES = 256 << 20  # float32 scores that the reference makes at a time; their softmax takes as much again


@op
def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    meta: AttentionMetadata,
) -> None:
    """Writes this step's keys and values, each [T, num_kv_heads, head_dim], to the slots of `meta.slot_mapping`."""
    block = meta.slot_mapping // meta.block_size
    offset = meta.slot_mapping % meta.block_size
    key_cache.transpose(1, 2)[block, offset] = key
    value_cache.transpose(1, 2)[block, offset] = value


@op
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention of this step's queries over everything cached of their own row.

    Query i of a row with q queries and s keys stands at position s - q + i and sees the keys at positions 0 to its own,
    and of those only the last `sliding_window` if that is given. Query heads share key heads in groups (GQA): query
    head h reads key head h // (num_heads / num_kv_heads).

    Args:
        query: [T, num_heads, head_dim].
        scale: factor on the dot products.
        sliding_window: number of keys visible to a query, its own included; None for all.

    Returns:
        [T, num_heads, head_dim] in the dtype of `query`; scores and sums are float32.
    """
    out = torch.empty_like(query)
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key_cache.shape[1]
    for row in range(meta.num_rows):
        start, stop = int(meta.query_start_cpu[row]), int(meta.query_start_cpu[row + 1])
        num_keys = int(meta.seq_lens_cpu[row])
        blocks = meta.block_tables[row, : -(-num_keys // meta.block_size)].long()
        k = key_cache[blocks].transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[:num_keys].float()
        v = value_cache[blocks].transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[:num_keys].float()
        key_position = torch.arange(num_keys, device=query.device)[None, :]
        step = max(1, SCORE_BYTES // (4 * num_heads * num_keys))
        for low in range(start, stop, step):
            high = min(low + step, stop)
            q = query[low:high].float().view(high - low, num_kv_heads, -1, head_dim)
            scores = torch.einsum("qkgd,skd->kgqs", q, k).mul_(scale)
            position = torch.arange(num_keys - (stop - low), num_keys - (stop - high), device=query.device)[:, None]
            hidden = key_position > position
            if sliding_window is not None:
                hidden |= key_position <= position - sliding_window
            weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
            attended = torch.einsum("kgqs,skd->qkgd", weights, v)
            out[low:high] = attended.reshape(-1, num_heads, head_dim).to(query.dtype)
    return out
