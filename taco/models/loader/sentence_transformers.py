"""What the files of sentence-transformers beside a model say about its embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taco.errors import TacoValidationError, UnsupportedFeatureError

_TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    *(f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta")),
)
_NO_LIMIT = 1 << 30
# Names of a pooling mode as a switch, and in newer files as a value -> ours.
_POOLING_MODES = {"cls_token": "CLS", "mean_tokens": "MEAN", "lasttoken": "LAST"}
_POOLING_VALUES = {"cls": "CLS", "mean": "MEAN", "lasttoken": "LAST"}


@dataclass(frozen=True)
class SentenceTransformersFiles:
    """The modules of a sentence-transformers model.

    Args:
        seq_pooling_type: "CLS", "LAST" or "MEAN"; None where no module pools, as in cross-encoders.
        include_prompt: whether the tokens of a prompt put before a text are pooled.
        normalize: whether embeddings are normalised to length 1.
        projections: folders of linear layers that pooled vectors pass through, in order.
        max_seq_length: longer texts are truncated by sentence-transformers; None for no limit of its own.
        activation: name of the function that makes probabilities of a cross-encoder's logits.
        lower_case: whether texts are lowered before they are tokenised.
        prompts: texts to put before others, by their name.
    """

    seq_pooling_type: str | None = None
    include_prompt: bool = True
    normalize: bool = False
    projections: tuple[str, ...] = ()
    max_seq_length: int | None = None
    activation: str | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)


def read_sentence_transformers_files(folder: str | Path) -> SentenceTransformersFiles | None:
    """Reads modules.json and what it refers to, and the settings beside it; None for a folder without such files.

    Raises:
        UnsupportedFeatureError: a module, or a way of pooling, is not implemented.
        TacoValidationError: a file is damaged.
    """
    folder = Path(folder)
    names = ("modules.json", "config_sentence_transformers.json", *_TRANSFORMER_FILES)
    if not any((folder / name).is_file() for name in names):
        return None
    modules = _read_json(folder / "modules.json", list)
    settings = _read_json(folder / "config_sentence_transformers.json", dict)
    transformer: Mapping[str, Any] = next(
        (found for n in _TRANSFORMER_FILES if (found := _read_json(folder / n, dict))), {}
    )
    values: dict[str, Any] = {}
    projections = []
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        path = folder / str(module.get("path", ""))
        if kind == "Transformer" and path != folder:
            raise UnsupportedFeatureError(
                f"{folder}/modules.json has its transformer in the folder {path.name}; pass that folder as `model`.",
                parameter="model",
            )
        if kind == "Pooling":
            values |= _pooling(path / "config.json")
        elif kind == "Dense":
            projections.append(str(path))
        elif kind == "Normalize":
            values["normalize"] = True
        elif kind not in ("Transformer", "Dropout"):
            raise UnsupportedFeatureError(
                f"{folder}/modules.json has a module of type {module.get('type')!r}, which is not implemented; there "
                "are Transformer, Pooling, Dense and Normalize.",
                parameter="model",
                value=module.get("type"),
            )
    prompts = settings.get("prompts") or {}
    max_seq_length = transformer.get("max_seq_length")
    if max_seq_length is None:  # newer versions leave it to the tokenizer, some of which have a huge number for none
        max_seq_length = _read_json(folder / "tokenizer_config.json", dict).get("model_max_length")
        max_seq_length = max_seq_length if isinstance(max_seq_length, int) and max_seq_length < _NO_LIMIT else None
    return SentenceTransformersFiles(
        projections=tuple(projections),
        max_seq_length=max_seq_length,
        activation=settings.get("activation_fn"),
        lower_case=bool(transformer.get("do_lower_case")),
        prompts={name: text for name, text in prompts.items() if isinstance(text, str)},
        **values,
    )


def _pooling(file: Path) -> dict[str, Any]:
    config = _read_json(file, dict)
    prefix = "pooling_mode_"
    modes = [name.removeprefix(prefix) for name, value in config.items() if name.startswith(prefix) and value is True]
    found = [_POOLING_MODES.get(mode) for mode in modes]
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
        found = [_POOLING_VALUES.get(modes[0])]
    if len(found) != 1 or found[0] is None:
        raise UnsupportedFeatureError(
            f"{file} pools by {modes}; implemented is one of {[*_POOLING_MODES]}. Pass pooler_config to choose one.",
            parameter="model",
            value=modes,
        )
    return {"seq_pooling_type": found[0], "include_prompt": config.get("include_prompt", True) is not False}


def _read_json(file: Path, kind: type) -> Any:
    """Contents of a file, which must be of a type; an empty one if there is no such file."""
    if not file.is_file():
        return kind()
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TacoValidationError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(contents, kind):
        raise TacoValidationError(f"{file} does not hold a JSON {'object' if kind is dict else 'list'}.")
    return contents
