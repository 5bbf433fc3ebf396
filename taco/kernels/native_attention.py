"""Paged attention by the native CPU kernels, and the form in which these take the batch of a step.

One kernel serves decoding and prefill. Its tasks are slices of the queries of one row with all query heads of one key
head; each task walks over the keys in tiles of 64, counted from position 0. So a query's sums are taken in the same
order whatever else is in the batch, however its prompt was cut into chunks, and wherever its blocks are.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import numpy as np
import torch

from taco.kernels import native
from taco.kernels.attention import paged_attention
from taco.kernels.metadata import AttentionMetadata


@dataclass
class NativeBatch:
    """The batch of a step for layers of one group size (query heads a key head).

    Args:
        structure: points into the tensors of the metadata and into `tasks`.
        query_rows: queries times heads of a task at most.
    """

    structure: native.Batch
    tasks: np.ndarray
    query_rows: int


def native_batch(meta: AttentionMetadata, group: int) -> NativeBatch:
    """The batch as the library takes it; made once a step."""
    key = ("native", group)
    batch = meta.cache.get(key)
    if batch is None:
        tasks, max_queries = _make_tasks(meta, group)
        structure = native.Batch(
            meta.query_start.data_ptr(),
            meta.seq_lens.data_ptr(),
            meta.block_tables.data_ptr(),
            meta.slot_mapping.data_ptr(),
            tasks.ctypes.data,
            meta.num_tokens,
            meta.block_tables.shape[1],
            meta.block_size,
            len(tasks),
            torch.get_num_threads(),
        )
        batch = meta.cache[key] = NativeBatch(structure, tasks, max_queries * group)
    return batch


def _make_tasks(meta: AttentionMetadata, group: int) -> tuple[np.ndarray, int]:
    """int32 [num_tasks, 3]: row, first query within the row, number of queries; and that number's maximum.

    The tasks with the most work come first, so that threads end at about the same time.
    """
    max_queries = max(1, 64 // group)  # as taco_query_rows
    num_queries = np.diff(meta.query_start_cpu)
    if meta.num_decode_rows == meta.num_rows:
        rows = np.arange(meta.num_rows)
        firsts, counts = np.zeros_like(rows), np.ones_like(rows)
        work = meta.seq_lens_cpu
    else:
        num_slices = -(-num_queries // max_queries)
        rows = np.repeat(np.arange(meta.num_rows), num_slices)
        firsts = (np.arange(len(rows)) - np.repeat(np.cumsum(num_slices) - num_slices, num_slices)) * max_queries
        counts = np.minimum(max_queries, num_queries[rows] - firsts)
        work = (meta.seq_lens_cpu[rows] - num_queries[rows] + firsts + counts) * (counts * group + 16)
    tasks = np.stack([rows, firsts, counts], 1).astype(np.int32)
    return np.ascontiguousarray(tasks[np.argsort(-work.astype(np.int64), kind="stable")]), max_queries


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
