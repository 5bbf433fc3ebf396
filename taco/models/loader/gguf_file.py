"""The header of a GGUF file: metadata and tensor table, without the tensor data.

The layout is described in docs/gguf.md of https://github.com/ggml-org/ggml: a magic, a version, two counts, the
key/value pairs, the tensor table, and the data section at the next multiple of `general.alignment`. The reader of the
gguf package wraps every element of every array in a numpy object, which takes 15 s for a vocabulary of 262144 tokens;
this one takes 0.1 s.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader.checkpoint import refuse_pointer

SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Value types of the format: the fixed-size ones as struct codes, and the two others.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9

_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table.

    Attributes:
        shape: as torch orders it, slowest dimension first.
        offset: where the data starts, in bytes from the start of the file.
        num_bytes: size of the data in the file.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensor table of a GGUF file; arrays of metadata are lists."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata of the architecture, `key` being given without its prefix, e.g. "block_count"."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def require(self, key: str) -> Any:
        """As `get`, but a missing key is an error.

        Raises:
            TacoValidationError: the file does not have the key.
        """
        value = self.get(key)
        if value is None:
            raise TacoValidationError(
                f"{self.path}: the metadata has no {self.architecture}.{key}, which is needed; convert the model again."
            )
        return value


def read_gguf_header(path: str) -> GGUFHeader:
    """Read the header of a GGUF file.

    Raises:
        TacoValidationError: not a GGUF file, or a damaged or truncated one.
        UnsupportedFeatureError: a version, byte order or tensor type that cannot be read, or a model split over files.
    """
    with open(path, "rb") as file:
        refuse_pointer(file)
        size = os.fstat(file.fileno()).st_size
        if size < 24 or file.read(4) != b"GGUF":
            raise TacoValidationError(f"{path} is not a GGUF file: it does not start with the bytes GGUF.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, data, size)
            except (struct.error, UnicodeDecodeError, IndexError, RecursionError) as error:
                raise TacoValidationError(
                    f"{path} is truncated or damaged: its header cannot be read ({error}); fetch it again."
                ) from error


def _parse(path: str, data: mmap.mmap, size: int) -> GGUFHeader:
    version, num_tensors, num_pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in SUPPORTED_VERSIONS:
        kind = "a big-endian file" if version & 0xFFFF == 0 else f"version {version} of the format"
        raise UnsupportedFeatureError(
            f"{path} is {kind}; little-endian files of versions {SUPPORTED_VERSIONS[0]} and {SUPPORTED_VERSIONS[1]} "
            "can be read: convert the model again with a current converter."
        )
    position = 24
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key, position = _read_string(data, position)
        (value_type,) = struct.unpack_from("<I", data, position)
        metadata[key], position = _read_value(data, position + 4, value_type)
    if "general.architecture" not in metadata:
        raise TacoValidationError(f"{path} does not name the architecture of its model (general.architecture).")
    if metadata.get("split.count", 0) > 1:
        raise UnsupportedFeatureError(
            f"{path} is one of {metadata['split.count']} parts of a model; join them first with `llama-gguf-split "
            "--merge` and pass the joined file."
        )

    rows: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(num_tensors):
        name, position = _read_string(data, position)
        (num_dims,) = struct.unpack_from("<I", data, position)
        dims = struct.unpack_from(f"<{num_dims}Q", data, position + 4)
        position += 4 + 8 * num_dims
        type_id, offset = struct.unpack_from("<IQ", data, position)
        position += 12
        rows.append((name, dims[::-1], type_id, offset))  # the format has the fastest dimension first

    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise TacoValidationError(f"{path} is damaged: general.alignment is {alignment!r}.")
    start = -(-position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in rows:
        if name in tensors:
            raise TacoValidationError(f"{path} is damaged: it has two tensors named {name}.")
        tensor = _tensor(path, name, shape, type_id, start + offset)
        if tensor.offset + tensor.num_bytes > size:
            raise TacoValidationError(
                f"{path} is truncated: the tensor {name} ends at byte {tensor.offset + tensor.num_bytes}, the file has "
                f"{size} bytes; fetch it again."
            )
        tensors[name] = tensor
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    for (one, tensor), (other, following) in pairwise(ordered):
        if tensor.offset + tensor.num_bytes > following.offset:
            raise TacoValidationError(f"{path} is damaged: the tensors {one} and {other} overlap; fetch it again.")
    return GGUFHeader(path, metadata, tensors)


def _tensor(path: str, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GGUFTensor:
    try:
        tensor_type = GGMLQuantizationType(type_id)
    except ValueError:
        raise UnsupportedFeatureError(
            f"{path}: the tensor {name} has type {type_id}, which the installed gguf package does not know; "
            "upgrade it with `pip install -U gguf`."
        ) from None
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    if not shape or not all(shape) or shape[-1] % block_size:
        raise TacoValidationError(
            f"{path} is damaged: the tensor {name} has the shape {shape}, which is not made of {tensor_type.name} "
            f"blocks of {block_size}."
        )
    return GGUFTensor(shape, tensor_type, offset, prod(shape) // block_size * block_bytes)


def _read_string(data: mmap.mmap, position: int) -> tuple[str, int]:
    (length,) = _U64.unpack_from(data, position)
    position += 8
    end = position + length
    if end > len(data):
        raise IndexError(f"a string of {length} bytes at byte {position}")
    return data[position:end].decode(), end


def _read_value(data: mmap.mmap, position: int, value_type: int) -> tuple[Any, int]:
    if value_type == _STRING:
        return _read_string(data, position)
    if value_type == _ARRAY:
        return _read_array(data, position)
    code = struct.Struct("<" + _scalar(value_type))
    return code.unpack_from(data, position)[0], position + code.size


def _read_array(data: mmap.mmap, position: int) -> tuple[list[Any], int]:
    element_type, length = struct.unpack_from("<IQ", data, position)
    position += 12
    values: list[Any] = []
    if element_type == _STRING:  # written out: vocabularies have hundreds of thousands of strings
        for _ in range(length):
            (num_bytes,) = _U64.unpack_from(data, position)
            end = position + 8 + num_bytes
            if end > len(data):
                raise IndexError(f"a string of {num_bytes} bytes at byte {position}")
            values.append(data[position + 8 : end].decode())
            position = end
        return values, position
    if element_type == _ARRAY:
        for _ in range(length):
            value, position = _read_array(data, position)
            values.append(value)
        return values, position
    code = _scalar(element_type)
    size = length * struct.calcsize("<" + code)
    if position + size > len(data):
        raise IndexError(f"an array of {length} elements at byte {position}")
    return list(struct.unpack_from(f"<{length}{code}", data, position)), position + size


def _scalar(value_type: int) -> str:
    if value_type not in _SCALARS:
        raise IndexError(f"a value of type {value_type}")
    return _SCALARS[value_type]
