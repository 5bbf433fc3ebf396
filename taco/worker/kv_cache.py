"""The KV cache tensors of one device, its swap space in host memory, and the copies between them."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch

from taco.worker.host_memory import explain_swap_space
from taco.worker.transfer import to_device

HUGE_PAGES_FROM = 4 << 20  # bytes of a tensor that is worth the larger pages


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed host tensor whose memory the system hands over when it is first written, and has back when it is freed.

    That is what memory taken from the system itself does. An allocator may reuse what it holds, and fill it with zeros.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes == 0:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes)
    if num_bytes >= HUGE_PAGES_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A host tensor that a CUDA device can copy from and to by itself. torch takes a power of two of bytes for it."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def pinned_pieces(num_blocks: int, block_bytes: int) -> list[int]:
    """How many blocks each of several pinned tensors takes, so that together they take little more than they hold.

    Each but the last few fills a power of two of bytes up to a rest smaller than a block.
    """
    pieces = []
    while num_blocks:
        power = 1 << ((num_blocks * block_bytes).bit_length() - 1)
        pieces.append(max(1, power // block_bytes))
        num_blocks -= pieces[-1]
    return pieces


def empty_pinned_cache() -> None:
    """Gives pinned memory that is no longer used back to the system; torch keeps it for later otherwise."""
    # Newer versions of torch have a public name for it; the older name exists in builds for CUDA alone.
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


class KVCache:
    """Keys and values of all layers: per layer two tensors [num_blocks, num_kv_heads, block_size, head_dim].

    Block 0 stays zero (it pads block tables). Swap space is taken together with the cache: for CUDA it is pinned
    memory, on a CPU memory that costs nothing before it is written.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_host_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._block_shape = (num_kv_heads, block_size, head_dim)
        self._num_layers, self._num_blocks, self._num_host_blocks = num_layers, num_blocks, num_host_blocks
        self._dtype = dtype
        self.device = device
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Swap space, [num_layers, 2, blocks, ...] each: consecutive host blocks, from `_host_starts` on.
        self._host: list[torch.Tensor] = []
        self._host_starts = np.zeros(0, np.int64)
        self.allocate()

    def allocate(self) -> None:
        """Takes the memory, zeroed.

        Raises:
            OutOfMemoryError: the swap space is more than the host has.
            torch.OutOfMemoryError: the cache is more than the device has.
        """
        shape = (self._num_blocks, *self._block_shape)
        on_cpu = self.device.type == "cpu"
        for _ in range(self._num_layers):
            key, value = (
                lazy_zeros(shape, self._dtype) if on_cpu else torch.zeros(shape, dtype=self._dtype, device=self.device)
                for _ in range(2)
            )
            self.layers.append((key, value))
        if self._num_host_blocks:
            with explain_swap_space():
                self._allocate_swap_space()

    def _allocate_swap_space(self) -> None:
        if self.device.type == "cpu":
            # Blocks side by side: they are used from the first one on, and the pages of the others stay untouched.
            shape = (self._num_host_blocks, self._num_layers, 2, *self._block_shape)
            self._host = [lazy_zeros(shape, self._dtype).movedim(0, 2)]
        else:
            block_bytes = self.bytes_per_block(self._num_layers, *self._block_shape, self._dtype)
            for count in pinned_pieces(self._num_host_blocks, block_bytes):
                self._host.append(pinned_empty((self._num_layers, 2, count, *self._block_shape), self._dtype))
        self._host_starts = np.cumsum([0, *(piece.shape[2] for piece in self._host)])[:-1]

    def free(self) -> None:
        """Gives the memory back, that of the swap space too."""
        self.layers.clear()
        self._host.clear()

    @staticmethod
    def bytes_per_block(num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * num_kv_heads * block_size * head_dim * dtype.itemsize

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (device block, host block) pairs to the host; a CUDA device does it in its turn, and nobody waits."""
        self._swap([(host, device) for device, host in pairs], to_host=True)

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (host block, device block) pairs to the device, likewise."""
        self._swap(pairs, to_host=False)

    def _swap(self, pairs: Sequence[tuple[int, int]], *, to_host: bool) -> None:
        """Copies (host block, device block) pairs: on the device one by one, across in runs of neighbours."""
        host, device = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
        piece = np.searchsorted(self._host_starts, host, side="right") - 1
        starts = np.flatnonzero((np.diff(host, prepend=-2) != 1) | np.diff(piece, prepend=-1) != 0)
        stops = [*starts[1:].tolist(), len(host)]
        firsts = (host - self._host_starts[piece])[starts].tolist()
        runs = list(zip(starts.tolist(), stops, piece[starts].tolist(), firsts, strict=True))
        index = to_device(np.ascontiguousarray(device), self.device)
        for layer_idx, layer in enumerate(self.layers):
            for part, tensor in enumerate(layer):
                rows = _as_rows(tensor)
                crossing = rows.index_select(0, index) if to_host else rows.new_empty(len(host), rows.shape[1])
                for start, stop, number, first in runs:
                    here = crossing[start:stop]
                    there = _as_rows(self._host[number][layer_idx, part])[first : first + stop - start]
                    target, source = (there, here) if to_host else (here, there)
                    target.copy_(source, non_blocking=True)
                if not to_host:
                    rows.index_copy_(0, index, crossing)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (source, target) pairs of device blocks: all are read before any is written."""
        source, target = to_device(np.array(pairs, np.int64).T.copy(), self.device)
        for layer in self.layers:
            for tensor in layer:
                rows = _as_rows(tensor)
                rows.index_copy_(0, target, rows.index_select(0, source))

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes device blocks whose content may not be finite: masked keys count 0 times, and 0 * nan is nan."""
        index = to_device(np.array(blocks, np.int64), self.device)
        for layer in self.layers:
            for tensor in layer:
                tensor.index_fill_(0, index, 0)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Blocks as rows of 64-bit numbers: on a CPU, torch copies such rows whole, and others element by element."""
    block_bytes = tensor[0].numel() * tensor.itemsize
    return tensor.flatten(1).view(torch.int64 if block_bytes % 8 == 0 else torch.uint8)
