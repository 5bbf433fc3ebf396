"""The protocol of a checkpoint: tensors under their Hugging Face names, whatever the file format is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol, runtime_checkable

from taco.errors import TacoValidationError

if TYPE_CHECKING:
    import torch

# Tensors larger than this are read in blocks of rows, so that loading needs little more memory than the weights.
BLOCK_BYTES = 64 << 20
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a checkpoint says about a tensor.

    Attributes:
        shape: in Hugging Face's orientation, after dequantisation.
        dtype: as stored: a torch dtype such as "float32" or "bfloat16", or a GGUF type such as "Q4_1".
    """

    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Protocol):
    """Tensors by name. Nothing but headers is read before `read`."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors, keyed by their Hugging Face names."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU: dequantised (to float32 if it was quantised), in Hugging Face's orientation."""
        ...

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        ...


@runtime_checkable
class BlockCheckpoint(Checkpoint, Protocol):
    """A checkpoint that can hand out a tensor piece by piece."""

    def read_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """`read`, in pairs of the index of a first row and a block of rows of at most about BLOCK_BYTES."""
        ...


def refuse_pointer(file: BinaryIO) -> None:
    """Raises TacoValidationError for what Git leaves in place of a large file it did not fetch; rewinds the file."""
    if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
        raise TacoValidationError(f"{file.name} only names the file that Git LFS has; fetch it: git lfs pull.")
    file.seek(0)


@dataclass(frozen=True)
class WeightEntry:
    """A tensor that a model wants from its checkpoint, and where it goes.

    Attributes:
        name: name in the checkpoint.
        shape: shape in the checkpoint.
        param: dotted name of the parameter in the model (`model.get_parameter(param)`).
        dim: if given, the (transposed) tensor fills as much of the parameter along this dimension as it has, else all.
        offset: first index along `dim`.
        transpose: the two dimensions are swapped first (the Conv1D of GPT-2).
        aliases: other names that the same tensor may have, e.g. without the prefix "model.".
    """

    name: str
    shape: tuple[int, ...]
    param: str
    dim: int | None = None
    offset: int = 0
    transpose: bool = False
    aliases: tuple[str, ...] = ()


def row_blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows (first, past the last) of at most about BLOCK_BYTES; a tensor without rows has one."""
    if not shape:
        yield 0, 1
        return
    row_bytes = itemsize
    for size in shape[1:]:
        row_bytes *= size
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def read_into(fd: int, buffer: memoryview, offset: int, path: str) -> None:
    """Fill `buffer` with the bytes of a file from `offset` on.

    Raises:
        TacoValidationError: the file ends too early.
    """
    while len(buffer):
        count = os.preadv(fd, [buffer], offset)
        if count == 0:
            raise TacoValidationError(f"{path} ends within a tensor; it was truncated since it was opened.")
        buffer = buffer[count:]
        offset += count
