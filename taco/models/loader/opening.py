"""Which files hold the weights of a model, and the checkpoint that reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from taco.errors import TacoValidationError
from taco.models.loader.checkpoint import Checkpoint
from taco.models.loader.gguf_checkpoint import GGUFCheckpoint
from taco.models.loader.safetensors_checkpoint import SafetensorsCheckpoint, TorchCheckpoint
from taco.models.loader.source import ModelSource, select_weight_files


def open_checkpoint(source: ModelSource, *, load_format: str, hf_config: Any) -> Checkpoint:
    """Open the weights of a model.

    Args:
        load_format: "auto" (safetensors, else .bin), "safetensors", "pt" or "gguf"; "dummy" has no checkpoint.
        hf_config: configuration of the model; GGUF files need it to undo the layout of their converter.

    Raises:
        TacoValidationError: there are no weights in that format, or their files are damaged or incomplete.
    """
    if source.kind == "gguf":
        return GGUFCheckpoint(source.path, hf_config)
    try:
        paths = _weight_files(Path(source.path), load_format)
        return SafetensorsCheckpoint(paths) if paths[0].endswith(".safetensors") else TorchCheckpoint(paths)
    except OSError as error:
        raise TacoValidationError(
            f"The weights in {source.path} cannot be read: {error}.", parameter="model"
        ) from error


def _weight_files(folder: Path, load_format: str) -> list[str]:
    """The files of the weights: one, or the shards that an index names, or all that there are."""
    names = select_weight_files(os.listdir(folder), load_format)
    if not names:
        raise TacoValidationError(
            f"{folder} has no weights that load_format={load_format!r} can read (*.safetensors, pytorch_model*.bin). "
            'Complete the folder, or pass load_format="dummy" for random weights.',
            parameter="model",
            value=str(folder),
        )
    index_name = "model.safetensors.index.json" if names[0].endswith(".safetensors") else "pytorch_model.bin.index.json"
    index = folder / index_name
    is_whole = names[0] in ("model.safetensors", "pytorch_model.bin")
    if index.is_file() and not is_whole:
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TacoValidationError(f"{index} is damaged: it has no valid weight_map ({error!r}).") from error
        if not names:
            raise TacoValidationError(f"{index} is damaged: its weight_map is empty.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise TacoValidationError(f"{folder} is incomplete: {index_name} names files that are missing: {missing}.")
    elif unusable := [name for name in names if not (folder / name).is_file()]:
        raise TacoValidationError(
            f"{folder} is incomplete: {unusable} are no files, or links to files that are missing."
        )
    return [str(folder / name) for name in names]
