"""Checks of a configuration that any model needs, before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from taco.errors import TacoValidationError

# Sizes, under the names that the architectures have for them, with bounds that no model comes near.
_SIZES = dict.fromkeys(
    (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "ffn_dim",
        "word_embed_proj_dim",
        "n_embd",
        "n_positions",
        "n_inner",
    ),
    1 << 30,
) | dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "n_head"), 1 << 20)
_SIZES |= dict.fromkeys(("num_hidden_layers", "n_layer"), 1 << 14)
_POSITIVE = ("rope_theta", "factor", "original_max_position_embeddings", "query_pre_attn_scalar", "sliding_window")


def check_config(config: Any) -> None:
    """Raises TacoValidationError, which names all of them, for values that no model can have.

    Args:
        config: transformers' `PretrainedConfig`.
    """
    problems = []
    architectures = getattr(config, "architectures", None)
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        problems.append(f"architectures is {architectures!r}; it must be a list of names")
    text_config = config.get_text_config()
    for name, most in _SIZES.items():
        value = getattr(text_config, name, None)
        if value is not None and not (_is_int(value) and 1 <= value <= most):
            problems.append(f"{name} is {value!r}; it must be an integer from 1 to {most}")
    for where, settings in _rope_settings(text_config):
        for name in _POSITIVE:
            if settings.get(name) is not None and not _is_positive(settings[name]):
                problems.append(f"{name} of {where} is {settings[name]!r}; it must be a positive number")
    for name in _POSITIVE:
        value = getattr(text_config, name, None)
        if value is not None and not _is_positive(value):
            problems.append(f"{name} is {value!r}; it must be a positive number")
    if not problems:
        for width, heads in (("hidden_size", "num_attention_heads"), ("n_embd", "n_head")):
            size, number = getattr(text_config, width, None), getattr(text_config, heads, None)
            if size is not None and number is not None and not getattr(text_config, "head_dim", None) and size % number:
                problems.append(f"{width}={size} is no multiple of {heads}={number}")
    if problems:
        raise TacoValidationError(
            f"The configuration of {config.name_or_path} cannot be used: {'; '.join(problems)}. Correct its "
            "config.json, or pass hf_overrides.",
            parameter="model",
            value=config.name_or_path,
        )


def _rope_settings(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Settings of rotary embeddings, one or one for each type of layer, and where they are."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, Mapping):
        nested = {f"rope_parameters[{key!r}]": value for key, value in rope.items() if isinstance(value, Mapping)}
        yield from (nested or {"rope_parameters": rope}).items()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
