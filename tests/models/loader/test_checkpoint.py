from __future__ import annotations

import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from taco.errors import TacoValidationError
from taco.models.loader import checkpoint as checkpoint_module
from taco.models.loader.checkpoint import BlockCheckpoint, Checkpoint, TensorInfo, row_blocks
from taco.models.loader.gguf_file import read_gguf_header
from taco.models.loader.opening import open_checkpoint
from taco.models.loader.source import ModelSource

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    named = {f"w.{str(dtype)[6:]}": (torch.randn(5, 3) * 10).to(dtype) for dtype in DTYPES}
    return named | {"mask": torch.tensor([True, False]), "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}


def open_folder(folder: Path, load_format: str = "auto") -> Checkpoint:
    return open_checkpoint(ModelSource("hf", str(folder)), load_format=load_format, hf_config=None)


def assert_holds(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert checkpoint.infos() == {
        name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape, name
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_safetensors_are_read_as_they_were_saved(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_folder(tmp_path)
    assert_holds(checkpoint, tensors())
    read = checkpoint.read("w.float32")
    checkpoint.close()
    assert torch.equal(read, tensors()["w.float32"])


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_files_are_read_as_they_were_saved(tmp_path: Path, new_format: bool) -> None:
    expected = {name: tensor for name, tensor in tensors().items() if "float8" not in name}
    torch.save(expected, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    checkpoint = open_folder(tmp_path)
    assert_holds(checkpoint, expected)
    checkpoint.close()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_of_an_index_are_one_checkpoint(tmp_path: Path, suffix: str) -> None:
    expected = {name: tensor for name, tensor in tensors().items() if "float8" not in name}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, name in enumerate(expected):
        file = f"{stem}-{number % 3}-of-3.{suffix}"
        weight_map[name] = file
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in expected.items() if weight_map[name] == file}
        save_file(part, tmp_path / file) if suffix == "safetensors" else torch.save(part, tmp_path / file)
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    # a file that the index does not name belongs to something else
    save_file({"other": torch.zeros(1)}, tmp_path / "vision.safetensors") if suffix == "safetensors" else None
    checkpoint = open_folder(tmp_path)
    assert_holds(checkpoint, expected)
    checkpoint.close()

    (tmp_path / f"{stem}-1-of-3.{suffix}").unlink()
    with pytest.raises(TacoValidationError, match=f"incomplete.*{stem}-1-of-3.{suffix}"):
        open_folder(tmp_path)
    index.write_text("{}")
    with pytest.raises(TacoValidationError, match="no valid weight_map"):
        open_folder(tmp_path)


def test_safetensors_win_over_bin_files_unless_asked(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    torch.save({"b": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert list(open_folder(tmp_path).infos()) == ["a"]
    assert list(open_folder(tmp_path, "pt").infos()) == ["b"]


def test_a_folder_without_weights_is_reported(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(TacoValidationError, match="has no weights that load_format='auto' can read"):
        open_folder(tmp_path)


def test_a_tensor_in_two_files_is_reported(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(TacoValidationError, match="two checkpoints"):
        open_folder(tmp_path)


def test_a_safetensors_file_cut_anywhere_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(4)}, file)
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(TacoValidationError, match="truncated"):
            open_folder(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "truncated or damaged"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}}, "truncated or damaged"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "header entry of w"),
        ({"w": 3}, "header entry of w"),
        ({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, "dtype F4"),
        ([], "not a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_damaged_safetensors_header_is_reported(tmp_path: Path, header: Any, message: str) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(TacoValidationError, match=message):
        open_folder(tmp_path)


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


def test_code_in_a_bin_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.zeros(1), "x": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TacoValidationError, match="could run code"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(TacoValidationError):
        open_folder(tmp_path)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02junk", b"\x80\x02", random.Random(4).randbytes(1000), b"PK\x03\x04" * 9]
)
def test_a_damaged_bin_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(
        TacoValidationError, match=r"pytorch_model\.bin is (truncated or )?damaged.*\(.+\); fetch it again"
    ):
        open_folder(tmp_path)


def test_a_sound_bin_file_that_cannot_be_read_safely_is_not_called_damaged(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin", pickle_protocol=4)
    with pytest.raises(TacoValidationError, match=r"or pickled in a way.*\(Unsupported operand \d+\).*to safetensors"):
        open_folder(tmp_path)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"]), "tensors (a and b|b and a) overlap"),
        (lambda h: h["b"].update(data_offsets=[8, 24]), "tensors a and b overlap"),
        (lambda h: json.dumps(h)[:-1] + ', "a": {}}', "a name is there twice"),
        (lambda h: h["a"].update(shape="ab"), "header entry of a"),
        (lambda h: h["a"].update(shape=[4.0]), "header entry of a"),
        (lambda h: h["a"].update(dtype=["F32"]), "dtype"),
        (lambda h: h["a"].update(data_offsets=["0", None]), "header entry of a"),
        (lambda h: "[" * 200_000, "not JSON"),
    ],
)
def test_headers_that_lie_are_damage(tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.arange(4.0)}, file)
    rewritten(file, change)
    with pytest.raises(TacoValidationError, match=message):
        open_folder(tmp_path)


def test_a_header_that_would_take_the_memory_is_damage(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((1 << 32).to_bytes(8, "little"))
        file.truncate((1 << 32) + 100)  # it takes no room on the disk
    with pytest.raises(TacoValidationError, match="is not a safetensors file"):
        open_folder(tmp_path)


def test_a_compressed_bin_file_is_read(tmp_path: Path) -> None:
    stored, packed = tmp_path / "stored", tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.arange(1000.0)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert torch.equal(open_folder(tmp_path).read("w"), torch.arange(1000.0))


@pytest.mark.parametrize(
    "content", [{"w": torch.eye(3).to_sparse()}, {"w": torch.empty(3, device="meta")}, {5: torch.zeros(1)}]
)
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(TacoValidationError, match="w is sparse, quantised or without values|5 is no name"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-00001-of-00002.safetensors"], "names files that are missing"),
        (["a -> nowhere"], "links to files that are missing"),
    ],
)
def test_files_that_are_missing_are_named(tmp_path: Path, files: list[str], message: str) -> None:
    if "->" in files[0]:
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    else:
        save_file({"a": torch.zeros(1)}, tmp_path / files[0])
        weight_map = {"a": files[0], "b": "model-00002-of-00002.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(TacoValidationError, match=message):
        open_folder(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, {"a": 3}, [1], None])
def test_a_useless_index_is_damage_or_names_what_is_missing(tmp_path: Path, weight_map: Any) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(TacoValidationError, match="weight_map|files that are missing"):
        open_folder(tmp_path)


def test_too_little_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RuntimeError, match="^DefaultCPUAllocator"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.gguf"])
def test_what_git_left_in_place_of_weights_is_no_damage(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(TacoValidationError, match=rf"{name} only names the file that Git LFS has.*git lfs pull"):
        open_folder(tmp_path) if name != "model.gguf" else read_gguf_header(str(tmp_path / name))


@pytest.mark.parametrize("content", [{"w": [1, 2]}, [torch.zeros(1)]])
def test_a_bin_file_without_a_dictionary_of_tensors_is_reported(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(TacoValidationError, match="is a list, not a tensor|holds a list"):
        open_folder(tmp_path)


def test_blocks_make_up_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "BLOCK_BYTES", 100)
    expected = {"matrix": torch.randn(20, 7), "cube": torch.randn(3, 2, 60), "row": torch.randn(70)}
    save_file(expected, tmp_path / "model.safetensors")
    checkpoint = open_folder(tmp_path)
    assert isinstance(checkpoint, BlockCheckpoint)
    for name, tensor in expected.items():
        blocks = list(checkpoint.read_blocks(name))
        assert len(blocks) > 1
        assert torch.equal(torch.cat([block for _, block in blocks]), tensor)
        assert [start for start, _ in blocks] == [
            sum(len(block) for _, block in blocks[:i]) for i in range(len(blocks))
        ]
    checkpoint.close()


def test_row_blocks_cover_all_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "BLOCK_BYTES", 64)
    assert list(row_blocks((10, 4), 4)) == [(0, 4), (4, 8), (8, 10)]
    assert list(row_blocks((2, 1000), 4)) == [(0, 1), (1, 2)]
    assert list(row_blocks((), 4)) == [(0, 1)]
    assert list(row_blocks((0, 4), 4)) == []
