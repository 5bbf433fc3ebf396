"""Checkpoints in Hugging Face's formats: safetensors, and the older .bin files of torch.save; sharded or not."""

from __future__ import annotations

import json
import operator
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import BinaryIO

import torch

from taco.errors import TacoValidationError
from taco.models.loader.checkpoint import TensorInfo, read_into, refuse_pointer, row_blocks

# Names that the safetensors format gives to dtypes (https://github.com/huggingface/safetensors, "Format").
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_MAX_HEADER_BYTES = 100_000_000  # as the format has it


@dataclass(frozen=True)
class _Location:
    file: BinaryIO
    offset: int  # of the data, in bytes from the start of the file
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsCheckpoint:
    """One or more .safetensors files.

    The files are read, not mapped: pages of a mapped file count as memory of the process, which would then hold the
    weights twice while it loads them.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._files: list[BinaryIO] = []
        self._locations: dict[str, _Location] = {}
        try:
            for path in paths:
                self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str) -> None:
        file = open(path, "rb", buffering=0)
        self._files.append(file)
        header, start = _read_header(file)
        size = os.fstat(file.fileno()).st_size
        places: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in self._locations:
                raise TacoValidationError(
                    f"The tensor {name} is both in {self._locations[name].file.name} and in {path}; the folder seems "
                    "to hold two checkpoints: remove one."
                )
            try:
                dtype_name, shape = str(entry["dtype"]), tuple(map(operator.index, entry["shape"]))
                begin, end = map(operator.index, entry["data_offsets"])
            except (TypeError, KeyError, ValueError) as error:
                raise TacoValidationError(f"{path} is damaged: the header entry of {name} is {entry!r}.") from error
            if dtype_name not in _DTYPES:
                raise TacoValidationError(
                    f"{path}: the tensor {name} has the dtype {dtype_name}, which is not supported."
                )
            dtype = _DTYPES[dtype_name]
            if end - begin != prod(shape) * dtype.itemsize or not 0 <= begin <= end <= size - start:
                raise TacoValidationError(
                    f"{path} is truncated or damaged: the tensor {name} ({dtype_name} {shape}) should be at bytes "
                    f"{start + begin} to {start + end}, the file has {size}; fetch it again."
                )
            self._locations[name] = _Location(file, start + begin, dtype, shape)
            places.append((begin, end, name))
        for (_, end, one), (begin, _, other) in pairwise(sorted(place for place in places if place[0] < place[1])):
            if begin < end:
                raise TacoValidationError(f"{path} is damaged: the tensors {one} and {other} overlap; fetch it again.")

    def infos(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(location.shape, str(location.dtype).removeprefix("torch."))
            for name, location in self._locations.items()
        }

    def read(self, name: str) -> torch.Tensor:
        location = self._locations[name]
        return _read_rows(location, 0, location.shape[0] if location.shape else 1)

    def read_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        location = self._locations[name]
        for start, stop in row_blocks(location.shape, location.dtype.itemsize):
            yield start, _read_rows(location, start, stop)

    def close(self) -> None:
        for file in self._files:
            file.close()


def _read_header(file: BinaryIO) -> tuple[dict[str, dict], int]:
    """The header, and where the data starts in bytes from the start of the file."""
    refuse_pointer(file)
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise TacoValidationError(f"{file.name} is truncated, or is not a safetensors file; fetch it again.")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise TacoValidationError(f"{file.name} is damaged: its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise TacoValidationError(f"{file.name} is damaged: its header is not a JSON object.")
    return header, 8 + length


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _read_rows(location: _Location, start: int, stop: int) -> torch.Tensor:
    row_shape = location.shape[1:]
    shape = (stop - start, *row_shape) if location.shape else ()
    tensor = torch.empty(shape, dtype=location.dtype)
    if tensor.numel():
        buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        row_bytes = prod(row_shape) * location.dtype.itemsize
        read_into(location.file.fileno(), buffer, location.offset + start * row_bytes, location.file.name)
    return tensor


class TorchCheckpoint:
    """One or more files written by torch.save, read without running any code that they contain.

    The files are mapped where torch can (those of torch 1.6 and later), so tensors are read when they are used.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            for name, tensor in _load_state_dict(path).items():
                if not isinstance(name, str):
                    raise TacoValidationError(f"{path}: {name!r} is no name of a tensor.")
                if not isinstance(tensor, torch.Tensor):
                    raise TacoValidationError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor.")
                if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
                    raise TacoValidationError(
                        f"{path}: {name} is sparse, quantised or without values; save it as a plain tensor."
                    )
                if name in self._tensors:
                    raise TacoValidationError(f"{path}: the tensor {name} is in another file, too.")
                self._tensors[name] = tensor

    def infos(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def close(self) -> None:
        self._tensors = {}


_SIGNS_OF_DAMAGE = ("invalid load key", "truncated", "unpickling stack underflow")


def _can_be_mapped(path: str) -> bool:
    """Whether the values lie in the file as they are: in the format of torch 1.6 and later, and not compressed."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())


def _load_state_dict(path: str) -> dict[str, object]:
    with open(path, "rb") as file:
        refuse_pointer(file)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except Exception as error:  # damaged pickles end in many ways
        text = str(error)
        if isinstance(error, MemoryError) or "allocate memory" in text:
            raise
        # torch puts advice to load whatever it may be before the reason.
        reason = (text.rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__).splitlines()[0]
        reason = reason.partition(". ")[0].rstrip(".")
        if "Unsupported operand" in reason:
            problem = "is damaged, or pickled in a way that cannot be read safely", "fetch it again, or convert it"
        elif isinstance(error, pickle.UnpicklingError) and not any(sign in text for sign in _SIGNS_OF_DAMAGE):
            problem = "holds more than tensors, and loading it could run code that is in it", "convert it"
        else:
            raise TacoValidationError(f"{path} is truncated or damaged ({reason}); fetch it again.") from error
        raise TacoValidationError(f"{path} {problem[0]} ({reason}); {problem[1]} to safetensors.") from error
    if not isinstance(state, dict):
        raise TacoValidationError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors.")
    return state
