"""What the sampler knows of each row, stored so that the rows of a batch are gathered without a Python loop."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from taco.worker.transfer import to_device


class RowArray:
    """One number a row, on the host, with a copy on the device that is refreshed when a row has changed.

    Args:
        num_rows: rows there can be.
        dtype: of the numbers, which are 0 until they are set.
    """

    def __init__(self, num_rows: int, dtype: type[np.generic], device: torch.device) -> None:
        self.host = np.zeros(num_rows, dtype)
        self._device = device
        self._copy = torch.from_numpy(self.host)  # on a CPU the same memory
        self._stale = device.type != "cpu"

    def set(self, row: int, value: float) -> None:
        self.host[row] = value
        self._stale = self._device.type != "cpu"

    def on_device(self, rows: np.ndarray) -> torch.Tensor:
        """The numbers of `rows`, [n] on the device."""
        if self._stale:
            self._copy = to_device(self.host, self._device)
            self._stale = False
        return self._copy[to_device(rows, self._device)]


class RaggedRows:
    """A list of (token id, number) pairs for each row, all in one flat buffer."""

    def __init__(self, num_rows: int) -> None:
        self._starts = np.zeros(num_rows, np.int64)
        self._lengths = np.zeros(num_rows, np.int64)
        self._capacities = np.zeros(num_rows, np.int64)
        self._ids = np.empty(0, np.int32)
        self._numbers = np.empty(0, np.float32)
        self._end = 0

    def set(self, row: int, token_ids: Collection[int], numbers: Collection[float] | float = 0.0) -> None:
        """Replaces the row's pairs."""
        self._lengths[row] = 0
        self.extend(row, token_ids, numbers)

    def extend(self, row: int, token_ids: Collection[int], numbers: Collection[float] | float = 0.0) -> None:
        """Appends pairs to the row's."""
        used = int(self._lengths[row])
        length = used + len(token_ids)
        if length > self._capacities[row]:
            self._move(row, max(16, 2 * length))
        place = slice(self._starts[row] + used, self._starts[row] + length)
        self._ids[place] = token_ids
        self._numbers[place] = numbers
        self._lengths[row] = length

    def increment(self, row: int, index: int, by: float) -> None:
        """Adds to the number of the row's pair `index`."""
        self._numbers[self._starts[row] + index] += by

    def pop(self, row: int) -> None:
        """Drops the row's last pair."""
        self._lengths[row] -= 1

    def clear(self, row: int) -> None:
        """Drops the row's pairs and gives their room back."""
        self._lengths[row] = self._capacities[row] = 0

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of several rows, one row after the other.

        Args:
            rows: int64 [n].

        Returns:
            Three arrays [total]: each pair's index into `rows` (int64), token id (int32) and number (float32).
        """
        lengths = self._lengths[rows]
        ends = lengths.cumsum()
        index = np.repeat(self._starts[rows] - (ends - lengths), lengths) + np.arange(ends[-1])
        return np.repeat(np.arange(len(rows)), lengths), self._ids[index], self._numbers[index]

    def _move(self, row: int, capacity: int) -> None:
        """Gives the row a larger place at the end of the buffer."""
        if self._end + capacity > len(self._ids):
            self._compact(capacity)
        old = slice(self._starts[row], self._starts[row] + self._lengths[row])
        new = slice(self._end, self._end + self._lengths[row])
        self._ids[new] = self._ids[old]
        self._numbers[new] = self._numbers[old]
        self._starts[row] = self._end
        self._capacities[row] = capacity
        self._end += capacity

    def _compact(self, spare: int) -> None:
        """Copies the places in use to a new buffer, twice as large as they and `spare` need."""
        ids, numbers = self._ids, self._numbers
        size = 2 * (int(self._capacities.sum()) + spare)
        self._ids = np.empty(size, np.int32)
        self._numbers = np.empty(size, np.float32)
        self._end = 0
        for row in np.flatnonzero(self._capacities):
            start, length = self._starts[row], self._lengths[row]
            self._ids[self._end : self._end + length] = ids[start : start + length]
            self._numbers[self._end : self._end + length] = numbers[start : start + length]
            self._starts[row] = self._end
            self._end += self._capacities[row]


def select_rows(matrix: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    """Rows of a matrix by ascending positions: the matrix itself where that is all of them, else a copy."""
    return matrix if len(positions) == len(matrix) else matrix[to_device(positions, matrix.device)]
