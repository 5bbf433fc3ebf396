"""The KV cache tensors of one device, its swap space in host memory, and the copies between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from taco.worker.transfer import to_device


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed host tensor whose memory the operating system hands over when it is first written."""
    raw = np.zeros(torch.Size(shape).numel() * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A host tensor that a CUDA device can copy from and to by itself. torch takes a power of two of bytes for it."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def empty_pinned_cache() -> None:
    """Gives pinned memory that is no longer used back to the system; torch keeps it for later otherwise."""
    # Newer versions of torch have a public name for it; the older name exists in builds for CUDA alone.
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


class KVCache:
    """Keys and values of all layers: per layer two tensors [num_blocks, num_kv_heads, block_size, head_dim].

    Block 0 stays zero (it pads block tables). Swap space has the same layout in host memory and is made when the first
    block is swapped out: on a CPU its pages cost nothing before they are written, for CUDA it is one pinned buffer.
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
        self._host: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.allocate()

    def allocate(self) -> None:
        """Takes the memory, zeroed."""
        shape = (self._num_blocks, *self._block_shape)
        for _ in range(self._num_layers):
            pair = []
            for _ in range(2):
                on_cpu = self.device.type == "cpu"
                pair.append(
                    lazy_zeros(shape, self._dtype)
                    if on_cpu
                    else torch.zeros(shape, dtype=self._dtype, device=self.device)
                )
            self.layers.append((pair[0], pair[1]))

    def free(self) -> None:
        """Gives the memory back, that of the swap space too."""
        self.layers.clear()
        self._host.clear()

    @staticmethod
    def bytes_per_block(num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * num_kv_heads * block_size * head_dim * dtype.itemsize

    def _host_layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not self._host:
            shape = (self._num_host_blocks, *self._block_shape)
            if self.device.type == "cpu":
                for key, value in self.layers:
                    self._host.append((lazy_zeros(shape, key.dtype), lazy_zeros(shape, value.dtype)))
            else:
                # One buffer for all, because each one is rounded up to a power of two.
                buffer = pinned_empty((len(self.layers), 2, *shape), self.layers[0][0].dtype)
                self._host = [(key, value) for key, value in buffer]
        return self._host

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (device block, host block) pairs to the host; a CUDA device does it in its turn, and nobody waits."""
        self._swap([(host, device) for device, host in pairs], to_host=True)

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (host block, device block) pairs to the device, likewise."""
        self._swap(pairs, to_host=False)

    def _swap(self, pairs: Sequence[tuple[int, int]], *, to_host: bool) -> None:
        """Copies (host block, device block) pairs: on the device one by one, across in runs of neighbours."""
        host, device = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
        starts = np.flatnonzero(np.diff(host, prepend=-2) != 1)
        runs = list(zip(starts.tolist(), [*starts[1:].tolist(), len(host)], host[starts].tolist(), strict=True))
        index = to_device(np.ascontiguousarray(device), self.layers[0][0].device)
        for layers, host_layers in zip(self.layers, self._host_layers(), strict=True):
            for tensor, host_tensor in zip(layers, host_layers, strict=True):
                rows, host_rows = _as_rows(tensor), _as_rows(host_tensor)
                crossing = rows.index_select(0, index) if to_host else rows.new_empty(len(host), rows.shape[1])
                for start, stop, first in runs:
                    here, there = crossing[start:stop], host_rows[first : first + stop - start]
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
                tensor[index] = 0


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Blocks as rows of 64-bit numbers: on a CPU, torch copies such rows whole, and others element by element."""
    block_bytes = tensor[0].numel() * tensor.itemsize
    return tensor.flatten(1).view(torch.int64 if block_bytes % 8 == 0 else torch.uint8)
