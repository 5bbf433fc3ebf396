"""Paged attention by the native CPU kernels, and the form in which these take the batch of a step.

One kernel serves decoding and prefill. Its tasks are slices of the queries of one row with all query heads of one key
head; each task walks over the keys in tiles of 64, counted from position 0. So a query's sums are taken in the same
order whatever else is in the batch, however its prompt was cut into chunks, and wherever its blocks are.

Rows that decode and have their first blocks in common make tasks together: those blocks are read and laid out once for
all of them (as in Hydragen, Juravsky et al. 2024, arXiv:2402.05099, but with the sums of each row in its own order).
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import numpy as np
import torch

from taco.kernels import native
from taco.kernels.attention import paged_attention
from taco.kernels.metadata import AttentionMetadata

KEYS = 64  # of a tile
MAX_QUERIES = 64  # of a task
TILE_WORK = 16  # what it takes to lay out the keys, in lines of queries that are multiplied with them


@dataclass
class NativeBatch:
    """The batch of a step for layers of one group size (query heads a key head).

    Args:
        structure: points into the tensors of the metadata and into `tasks` and `members`.
        query_rows: queries times heads of a task at most.
    """

    structure: native.Batch
    tasks: np.ndarray
    members: np.ndarray
    query_rows: int


def native_batch(meta: AttentionMetadata, group: int) -> NativeBatch:
    """The batch as the library takes it; made once a step."""
    key = ("native", group)
    batch = meta.cache.get(key)
    if batch is None:
        tasks, members, max_queries = _make_tasks(meta, group)
        structure = native.Batch(
            meta.query_start.data_ptr(),
            meta.seq_lens.data_ptr(),
            meta.block_tables.data_ptr(),
            meta.slot_mapping.data_ptr(),
            tasks.ctypes.data,
            members.ctypes.data,
            meta.num_tokens,
            meta.block_tables.shape[1],
            meta.block_size,
            len(tasks),
            torch.get_num_threads(),
        )
        batch = meta.cache[key] = NativeBatch(structure, tasks, members, max_queries * group)
    return batch


def _make_tasks(meta: AttentionMetadata, group: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The tasks, int32 [num_tasks, 4], and the members of those of several rows, int32 [n], as `native.Batch` has them;
    and the largest number of queries of a task.

    The tasks with the most work come first, so that threads end at about the same time.
    """
    max_queries = max(1, MAX_QUERIES // group)  # as taco_query_rows
    num_queries = np.diff(meta.query_start_cpu)
    if meta.num_decode_rows == meta.num_rows:
        rows = np.arange(meta.num_rows)
        firsts, counts = np.zeros_like(rows), np.ones_like(rows)
        work = meta.seq_lens_cpu.astype(np.int64) * (group + TILE_WORK)
    else:
        num_slices = -(-num_queries // max_queries)
        rows = np.repeat(np.arange(meta.num_rows), num_slices)
        firsts = (np.arange(len(rows)) - np.repeat(np.cumsum(num_slices) - num_slices, num_slices)) * max_queries
        counts = np.minimum(max_queries, num_queries[rows] - firsts)
        last_keys = meta.seq_lens_cpu[rows].astype(np.int64) - num_queries[rows] + firsts + counts
        work = last_keys * (counts * group + TILE_WORK)
    tasks = np.stack([rows, firsts, counts, np.zeros_like(rows)], 1)
    members: list[int] = []
    together = _rows_together(meta, max_queries)
    if together:
        alone = np.ones(meta.num_rows, bool)
        merged = []
        for shared, sharing in together:
            alone[sharing] = False
            merged.append((len(members), 0, len(sharing), shared))
            members += sharing
            own = int(meta.seq_lens_cpu[sharing].sum()) - shared * len(sharing)
            work = np.append(work, shared * (len(sharing) * group + TILE_WORK) + own * (group + TILE_WORK))
        kept = np.append(alone[rows], np.ones(len(merged), bool))
        tasks, work = np.concatenate([tasks, merged])[kept], work[kept]
    order = np.argsort(-work, kind="stable")
    return np.ascontiguousarray(tasks[order], np.int32), np.array(members, np.int32), max_queries


def _rows_together(meta: AttentionMetadata, max_members: int) -> list[tuple[int, list[int]]]:
    """Groups of decoding rows whose first keys are in the same blocks.

    Returns:
        For each group the number of keys in common, a multiple of `KEYS`, and its rows, two or more.
    """
    # With many threads small groups, so that all have something to do.
    max_members = min(max_members, -(-meta.num_decode_rows // torch.get_num_threads()))
    if max_members < 2:
        return []
    tables = meta.block_tables[: meta.num_decode_rows].numpy()
    order = np.argsort(tables[:, 0], kind="stable")
    tables, lens = tables[order], meta.seq_lens_cpu[order]
    differs = tables[1:] != tables[:-1]
    num_blocks = np.where(differs.any(1), differs.argmax(1), tables.shape[1])
    # Keys that a row has in common with the one before it; tables are padded alike.
    common = np.minimum(num_blocks * meta.block_size, np.minimum(lens[1:], lens[:-1])) // KEYS * KEYS
    if not common.any():
        return []
    groups: list[tuple[int, list[int]]] = []
    shared, sharing = 0, [int(order[0])]
    for row, keys in zip(order[1:].tolist(), common.tolist(), strict=True):
        fewer = min(shared, keys) if len(sharing) > 1 else keys
        # What is saved grows with the keys in common, and with the rows beyond the first.
        if len(sharing) < max_members and fewer and fewer * len(sharing) >= shared * (len(sharing) - 1):
            sharing.append(row)
            shared = fewer
            continue
        groups.append((shared, sharing))
        shared, sharing = 0, [row]
    groups.append((shared, sharing))
    return [(shared, sharing) for shared, sharing in groups if len(sharing) > 1]


def attention_scratch_bytes(dtype: torch.dtype, head_dim: int, batch: NativeBatch) -> int:
    """Scratch memory of all threads."""
    library = native.library()
    assert library is not None
    one = library.taco_attention_scratch(native.TYPES[dtype], head_dim, batch.query_rows)
    return one * batch.structure.num_threads


@paged_attention.candidate("native")
def paged_attention_native(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """In bfloat16 the weights of the keys are rounded to bfloat16, sums are float32."""
    library = native.library()
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[1]
    if (
        library is None
        or query.device.type != "cpu"
        or query.dtype not in native.TYPES
        or key_cache.dtype != query.dtype
        or head_dim % native.GROUP[query.dtype]
    ):
        return NotImplemented
    if query.stride()[1:] != (head_dim, 1):
        query = query.contiguous()
    batch = native_batch(meta, num_heads // num_kv_heads)
    layer = native.Layer(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=sliding_window or 0, scale=scale
    )
    scratch = meta.workspace.take("native", (attention_scratch_bytes(query.dtype, head_dim, batch),), torch.uint8)
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=query.dtype)
    library.taco_attention(
        native.TYPES[query.dtype],
        byref(layer),
        byref(batch.structure),
        query.data_ptr(),
        query.stride(0),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        out.data_ptr(),
        scratch.data_ptr(),
    )
    return out
