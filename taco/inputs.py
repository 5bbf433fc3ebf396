"""Prompts as users write them, and the check of their form.

What needs the tokenizer or the model (length, vocabulary, emptiness) is checked by the engine.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import numpy as np

from taco.errors import TacoValidationError, UnsupportedFeatureError


class TacoPromptTypeError(TacoValidationError, TypeError):
    """A prompt does not have the form of one."""


class _PromptOptions(TypedDict, total=False):
    multi_modal_data: Any
    media_io_kwargs: dict[str, dict[str, Any]] | None
    mm_processor_kwargs: dict[str, Any] | None
    multi_modal_uuids: Any
    cache_salt: str


class TextPrompt(_PromptOptions, total=False):
    """A prompt as text: `prompt`."""

    prompt: str


class TokensPrompt(_PromptOptions, total=False):
    """A prompt as token ids: `prompt_token_ids`. A `prompt` beside them is only echoed."""

    prompt_token_ids: list[int]
    prompt: str
    token_type_ids: list[int]
    prompt_token_offsets: list[tuple[int, int]] | None


class EmbedsPrompt(_PromptOptions, total=False):
    """A prompt as embeddings: `prompt_embeds`, a tensor [num_tokens, hidden_size]."""

    prompt_embeds: Any
    prompt: str
    prompt_token_ids: list[int]
    prompt_is_token_ids: list[bool]


class DataPrompt(_PromptOptions, total=False):
    """A prompt for a plugin that makes the real one of it."""

    data: Any
    data_format: str


class ExplicitEncoderDecoderPrompt(TypedDict, total=False):
    """Separate prompts for the encoder and the decoder."""

    encoder_prompt: Any
    decoder_prompt: Any
    mm_processor_kwargs: dict[str, Any] | None


SingletonPrompt: TypeAlias = str | list[int] | TextPrompt | TokensPrompt | EmbedsPrompt
PromptType: TypeAlias = SingletonPrompt | DataPrompt | ExplicitEncoderDecoderPrompt

_UNSUPPORTED_KEYS = {
    "prompt_embeds": "prompts as embeddings",
    "prompt_is_token_ids": "prompts as embeddings",
    "multi_modal_data": "images, audio or video",
    "media_io_kwargs": "images, audio or video",
    "mm_processor_kwargs": "images, audio or video",
    "multi_modal_uuids": "images, audio or video",
    "encoder_prompt": "encoder-decoder models",
    "decoder_prompt": "encoder-decoder models",
    "data": "prompts that a plugin interprets",
    "data_format": "prompts that a plugin interprets",
    "token_type_ids": "token type ids",
    "prompt_token_offsets": "token offsets",
}
_SUPPORTED_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_KNOWN_KEYS = frozenset(_SUPPORTED_KEYS) | frozenset(_UNSUPPORTED_KEYS)


@dataclass(slots=True)
class ParsedPrompt:
    """One prompt in its plain form: exactly one of `text` and `token_ids` is given.

    Args:
        text: to be tokenized.
        token_ids: the tokens; a list of Python ints that nobody else holds.
        cache_salt: separates its prefix-cache entries from those of other salts.
        prompt_text_echo: text that came with the prompt: `text` itself, or the `prompt` given beside token ids.
        text_pair: a second text, for pooling models that compare two.
        token_type_ids: which of the two each token belongs to; None for the first.
    """

    text: str | None
    token_ids: list[int] | None
    cache_salt: str | None = None
    prompt_text_echo: str | None = None
    text_pair: str | None = None
    token_type_ids: list[int] | None = None


def single_prompts(prompts: object) -> Iterator[object] | list[object]:
    """The single prompts of an argument: an iterator as it is, anything else as `split_prompts` has it."""
    return prompts if isinstance(prompts, Iterator) else split_prompts(prompts)


def split_prompts(prompts: object) -> list[object]:
    """Splits the `prompts` argument into single prompts, without looking into them.

    One prompt: str, bytes, a dict, a list of ints, a one-dimensional array of integers. Many: any other list, a tuple,
    a two-dimensional array (one prompt a row), any other iterable. An empty list is no prompt at all.

    Raises:
        TacoPromptTypeError: it is none of these.
    """
    if isinstance(prompts, (str, bytes, bytearray, Mapping)):
        return [prompts]
    if isinstance(prompts, np.ndarray) and prompts.ndim > 0:
        return [prompts] if prompts.ndim == 1 and prompts.dtype.kind in "iu" else list(prompts)
    if isinstance(prompts, list):
        return [prompts] if prompts and _is_int(prompts[0]) else prompts.copy()
    if isinstance(prompts, (set, frozenset)):
        raise TacoPromptTypeError("prompts cannot be a set, which has no order; pass a list.", parameter="prompts")
    if isinstance(prompts, Iterable) and not isinstance(prompts, np.ndarray):
        return list(prompts)
    raise TacoPromptTypeError(
        "prompts must be one prompt (a string, list of tokens, or dictionary) or an iterable of prompts, "
        f"but is of type {type(prompts).__name__}.",
        parameter="prompts",
        value=prompts,
    )


def parse_prompt(prompt: object) -> ParsedPrompt:
    """Checks the form of one prompt and brings it into a plain one.

    Args:
        prompt: a str, token ids (list or tuple of ints, one-dimensional array of integers), or a dict with `prompt` or
            `prompt_token_ids` (which win if both are given) and possibly `cache_salt`. Values None count as absent.

    Raises:
        TacoPromptTypeError: it has another form.
        UnsupportedFeatureError: it has a form of vLLM that taco does not take.
        TacoValidationError: the text is not valid Unicode, or the salt is empty.
    """
    if isinstance(prompt, str):
        _check_text(prompt)
        return ParsedPrompt(prompt, None, None, prompt)
    if isinstance(prompt, (list, tuple, np.ndarray)):
        return ParsedPrompt(None, _as_token_ids(prompt))
    if isinstance(prompt, Mapping):
        return _parse_dict(prompt)
    if isinstance(prompt, (bytes, bytearray)):
        raise UnsupportedFeatureError(
            "A prompt of type bytes is a serialized tensor (prompt_embeds): this version of taco does not have prompts "
            "as embeddings. Decode text to a string first.",
            parameter="prompt",
        )
    raise TacoPromptTypeError(
        "Prompt should be a string, list of tokens, or dictionary (inputs must be a string, TextPrompt, or "
        f"TokensPrompt), but is of type {type(prompt).__name__}.",
        parameter="prompt",
        value=prompt,
    )


def _parse_dict(prompt: Mapping[Any, Any]) -> ParsedPrompt:
    keys = prompt.keys()
    if unknown := keys - _KNOWN_KEYS:
        raise TacoPromptTypeError(
            f"Prompt dictionary has unknown key(s) {', '.join(sorted(map(repr, unknown)))}; known are "
            f"{list(_SUPPORTED_KEYS)}.",
            parameter="prompt",
            value=prompt,
        )
    for key, value in prompt.items():
        is_empty = value is None or (isinstance(value, (Mapping, list, tuple)) and not value)
        if key in _UNSUPPORTED_KEYS and not is_empty:
            raise UnsupportedFeatureError(
                f"Prompt key {key!r} is not supported: this version of taco does not have {_UNSUPPORTED_KEYS[key]}.",
                parameter=key,
            )
    salt = prompt.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise TacoValidationError(f"cache_salt must be a non-empty string, got {salt!r}.", parameter="cache_salt")
    if salt is not None and _lone_surrogate(salt) is not None:
        raise TacoValidationError(f"cache_salt must be valid Unicode, got {salt!r}.", parameter="cache_salt")
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None:
        if not isinstance(text, str):
            raise TacoPromptTypeError(
                f"Prompt text should be a string, but prompt is of type {type(text).__name__}.",
                parameter="prompt",
                value=text,
            )
        _check_text(text)
    if token_ids is not None:
        return ParsedPrompt(None, _as_token_ids(token_ids), salt, text)
    if text is not None:
        return ParsedPrompt(text, None, salt, text)
    raise TacoPromptTypeError(
        f"Prompt dictionary must contain text, tokens, or embeddings, got keys {list(keys)}; set 'prompt' or "
        "'prompt_token_ids'.",
        parameter="prompt",
        value=prompt,
    )


def _is_int(value: object) -> bool:
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def _as_token_ids(token_ids: Any) -> list[int]:
    if isinstance(token_ids, np.ndarray):
        if token_ids.ndim == 1 and token_ids.dtype.kind in "iu":
            ids: list[int] = token_ids.tolist()
            return ids
        got = f"an array of shape {token_ids.shape} and type {token_ids.dtype}"
    elif isinstance(token_ids, (list, tuple)):
        # The types of a million tokens are compared without running Python code for each.
        if set(map(type, token_ids)) <= {int}:
            return list(token_ids)
        bad = next((i for i, token_id in enumerate(token_ids) if not _is_int(token_id)), None)
        if bad is None:
            return [int(token_id) for token_id in token_ids]
        got = f"{token_ids[bad]!r:.80} of type {type(token_ids[bad]).__name__} at position {bad}"
    else:
        got = type(token_ids).__name__ + ("; use its .tolist()" if hasattr(token_ids, "tolist") else "")
    raise TacoPromptTypeError(
        f"Token prompt should be a list of integers, got {got}.", parameter="prompt_token_ids", value=token_ids
    )


def _lone_surrogate(text: str) -> int | None:
    """Where half a surrogate pair stands in a text; None in valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _check_text(text: str) -> None:
    if text.isascii():  # known without reading the text
        return
    if (start := _lone_surrogate(text)) is not None:
        raise TacoValidationError(
            f"prompt text has a lone surrogate (U+{ord(text[start]):04X}) at character {start}, so it is "
            "not valid Unicode and cannot be tokenized; repair it with "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').",
            parameter="prompt",
        )
