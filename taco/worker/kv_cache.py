"""The KV cache tensors of one device, its swap space in host memory, and the copies between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed host tensor whose memory the operating system hands over when it is first written."""
    raw = np.zeros(torch.Size(shape).numel() * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


class KVCache:
    """Keys and values of all layers: per layer two tensors [num_blocks, num_kv_heads, block_size, head_dim].

    Block 0 stays zero (it pads block tables). Swap space has the same layout in host memory and is made when the first
    block is swapped out; on a CPU its pages cost nothing before they are written.
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
            for key, value in self.layers:
                if self.device.type == "cpu":
                    self._host.append((lazy_zeros(shape, key.dtype), lazy_zeros(shape, value.dtype)))
                else:
                    self._host.append(
                        (
                            torch.empty(shape, dtype=key.dtype, pin_memory=True),
                            torch.empty(shape, dtype=value.dtype, pin_memory=True),
                        )
                    )
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
