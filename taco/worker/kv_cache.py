"""The KV cache tensors of one device, its swap space in host memory, and the copies between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


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
        self._num_host_blocks = num_host_blocks
        self._host: list[tuple[torch.Tensor, torch.Tensor]] = []
        shape = (num_blocks, *self._block_shape)
        self.device = device
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _ in range(num_layers):
            pair = []
            for _ in range(2):
                on_cpu = device.type == "cpu"
                pair.append(lazy_zeros(shape, dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device))
            self.layers.append((pair[0], pair[1]))

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
        """Copies (device block, host block) pairs to the host."""
        device, host = _indices(pairs)
        for layers, host_layers in zip(self.layers, self._host_layers(), strict=True):
            for source, target in zip(layers, host_layers, strict=True):
                target[host] = source[device.to(source.device)].to(target.device)

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (host block, device block) pairs to the device."""
        host, device = _indices(pairs)
        for layers, host_layers in zip(self.layers, self._host_layers(), strict=True):
            for target, source in zip(layers, host_layers, strict=True):
                target[device.to(target.device)] = source[host].to(target.device)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (source, target) pairs of device blocks."""
        source, target = (index.to(self.device) for index in _indices(pairs))
        for layer in self.layers:
            for tensor in layer:
                tensor[target] = tensor[source]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes device blocks whose content may not be finite: masked keys count 0 times, and 0 * nan is nan."""
        index = torch.tensor(list(blocks), dtype=torch.int64, device=self.device)
        for layer in self.layers:
            for tensor in layer:
                tensor[index] = 0


def _indices(pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return table[:, 0], table[:, 1]
