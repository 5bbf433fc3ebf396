"""What every attention kernel needs to know about the batch of one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


class Workspace:
    """Scratch memory that is reused by every layer and step, so that no transient is allocated twice.

    A fresh allocation of some megabytes costs more in page faults on a CPU than the work done in it. Buffers are keyed
    by name and only ever grow.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor; it is valid until the next `take` of the same name and dtype."""
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:size].view(shape)

    def free(self) -> None:
        """Gives all memory back."""
        self._buffers.clear()


@dataclass
class AttentionMetadata:
    """The batch of one step, in the packed (varlen) layout: T tokens of R rows, row after row.

    The KV cache of a layer is two tensors, keys and values, of shape [num_blocks, num_kv_heads, block_size, head_dim].
    Block 0 belongs to nobody and stays zero: tables are padded with it.

    Rows with a single query token (decode) come first: rows [0, num_decode_rows).

    Args:
        query_start: int32 [R + 1], tokens of row r are [query_start[r], query_start[r + 1]).
        seq_lens: int32 [R], number of keys of each row after this step's tokens have been written.
        block_tables: int32 [R, max_blocks], block ids of each row in order, padded with 0.
        slot_mapping: int64 [T], block id * block_size + offset in the block where each token's key is written.
        query_start_cpu, seq_lens_cpu: the same as NumPy arrays on the host.
        num_decode_rows: how many rows at the front have exactly one query token.
        block_size: tokens a block.
        workspace: scratch memory of the worker.
        cache: what kernels derive from the metadata once a step and share among the layers.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_cpu: np.ndarray
    seq_lens_cpu: np.ndarray
    num_decode_rows: int
    block_size: int
    workspace: Workspace
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.seq_lens_cpu)

    @property
    def num_tokens(self) -> int:
        return int(self.query_start_cpu[-1])
