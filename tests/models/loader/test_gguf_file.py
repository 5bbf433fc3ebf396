from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader.gguf_file import read_gguf_header

TEXT = st.text(max_size=8)
SCALARS = st.one_of(
    st.tuples(st.just("uint8"), st.integers(0, 2**8 - 1)),
    st.tuples(st.just("int8"), st.integers(-(2**7), 2**7 - 1)),
    st.tuples(st.just("uint16"), st.integers(0, 2**16 - 1)),
    st.tuples(st.just("int16"), st.integers(-(2**15), 2**15 - 1)),
    st.tuples(st.just("uint32"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("int32"), st.integers(-(2**31), 2**31 - 1)),
    st.tuples(st.just("uint64"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("int64"), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just("float32"), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just("float64"), st.floats(allow_nan=False)),
    st.tuples(st.just("bool"), st.booleans()),
    st.tuples(st.just("string"), TEXT.filter(bool)),
    st.tuples(
        st.just("array"),
        st.one_of(
            st.lists(TEXT, min_size=1, max_size=5),
            st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
            st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
            st.lists(st.booleans(), min_size=1, max_size=5),
        ),
    ),
)


def write(path: Path, pairs: dict[str, tuple[str, Any]] | None = None, tensors: dict[str, Any] | None = None) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, (kind, value) in (pairs or {}).items():
        getattr(writer, f"add_{kind}")(key, value)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write(
        path,
        {"words": ("array", ["a", "bc", ""]), "name": ("string", "x"), "numbers": ("array", [1.5, 2.0])},
        {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b.bias": np.ones(5, dtype=np.float16)},
    )
    return path


@settings(max_examples=60, deadline=None)
@given(pairs=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda key: "." not in key), SCALARS, max_size=5))
def test_metadata_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(path, pairs)
    metadata = read_gguf_header(str(path)).metadata
    assert metadata == {"general.architecture": "llama"} | {key: value for key, (_, value) in pairs.items()}


def test_the_tensor_table_is_that_of_the_gguf_package(small_file: Path) -> None:
    reader = gguf.GGUFReader(small_file)
    tensors = read_gguf_header(str(small_file)).tensors
    assert list(tensors) == ["a.weight", "b.bias"]
    for expected in reader.tensors:
        tensor = tensors[expected.name]
        assert tensor.shape == tuple(expected.shape.tolist())[::-1]
        assert (tensor.type, tensor.offset) == (expected.tensor_type, expected.data_offset)
        assert tensor.num_bytes == expected.n_bytes


def test_a_file_cut_anywhere_is_reported_as_truncated(small_file: Path) -> None:
    data = small_file.read_bytes()
    end = max(tensor.offset + tensor.num_bytes for tensor in read_gguf_header(str(small_file)).tensors.values())
    for length in range(end):
        small_file.write_bytes(data[:length])
        with pytest.raises(TacoValidationError, match="truncated|not a GGUF file"):
            read_gguf_header(str(small_file))
    small_file.write_bytes(data[:end])
    read_gguf_header(str(small_file))


@settings(max_examples=300, deadline=None)
@given(position=st.integers(4, 300), value=st.integers(0, 2**32 - 1))
def test_a_damaged_header_raises_a_user_error_or_none(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(path, {"words": ("array", ["a", "bc"]), "n": ("uint32", 3)}, {"a.weight": np.ones((2, 3), dtype=np.float32)})
    data = bytearray(path.read_bytes())
    position = min(position, len(data) - 4)
    data[position : position + 4] = struct.pack("<I", value)
    path.write_bytes(data)
    try:
        read_gguf_header(str(path))
    except TacoValidationError as error:
        assert str(path) in str(error)


def test_nested_arrays_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, {"pairs": ("array", [[1, 2], [3]])})
    assert read_gguf_header(str(path)).metadata["pairs"] == [[1, 2], [3]]


def test_other_files_and_versions_are_refused(tmp_path: Path, small_file: Path) -> None:
    (tmp_path / "other").write_bytes(b"\0" * 100)
    with pytest.raises(TacoValidationError, match="is not a GGUF file"):
        read_gguf_header(str(tmp_path / "other"))
    data = bytearray(small_file.read_bytes())
    for version, message in ((1, "version 1"), (3 << 24, "big-endian")):
        data[4:8] = struct.pack("<I", version)
        small_file.write_bytes(data)
        with pytest.raises(UnsupportedFeatureError, match=message):
            read_gguf_header(str(small_file))


def test_a_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, {"split.count": ("uint16", 3)})
    with pytest.raises(UnsupportedFeatureError, match="one of 3 parts"):
        read_gguf_header(str(path))


def test_a_missing_key_is_named(small_file: Path) -> None:
    with pytest.raises(TacoValidationError, match=r"no llama\.block_count"):
        read_gguf_header(str(small_file)).require("block_count")
