"""Checks of the parameters of one request: each brings a value into its canonical form, or says what it must be."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from taco.errors import TacoValidationError, unknown_arguments

T = TypeVar("T")

MAX_LOGIT_BIAS = 100.0
NUM_SHOWN = 5  # offending values in a message


class ParameterTypeError(TacoValidationError, TypeError):
    """A parameter of a request has the wrong type."""


def type_error(name: str, expected: str, value: object) -> ParameterTypeError:
    message = f"{name} must be {expected}, but is of type {type(value).__name__}: {str(value)[:80]}"
    return ParameterTypeError(message, parameter=name, value=value)


def as_int(name: str, value: Any) -> int:
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise type_error(name, "an int", value)


def as_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise type_error(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise TacoValidationError(f"{name} is larger than any float.", parameter=name, value=value) from None


def as_bool(name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_, int)) and value in (0, 1):
        return bool(value)
    raise type_error(name, "a bool", value)


def as_token_ids(name: str, value: Any) -> list[int]:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise type_error(name, "a list of token ids", value)
    ids = list(value)
    try:
        return [token_id if type(token_id) is int else as_int(name, token_id) for token_id in ids]
    except ParameterTypeError:
        raise ParameterTypeError(
            f"{name} must contain only integers, got {str(ids)[:200]}.", parameter=name, value=value
        ) from None


def as_strings(name: str, value: Any) -> list[str]:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise type_error(name, "a list of strings", value)
    strings = list(value)
    for element in strings:
        if not isinstance(element, str):
            raise type_error(name, "a list of strings (one element)", element)
        if not element:
            raise TacoValidationError(
                f"{name} cannot contain an empty string. Got {name}={strings}; remove it.", parameter=name, value=value
            )
    return strings


def require(condition: bool, name: str, value: object, message: str) -> None:
    if not condition:
        raise TacoValidationError(f"{name} {message}, got {value}.", parameter=name, value=value)


def suggests_names(cls: type[T]) -> type[T]:
    """Makes the constructor of a dataclass answer unknown names with known ones.

    The check is in `__new__`, as programs read the names from `__init__`, some of them from its code.
    """
    init = cls.__init__
    known = list(inspect.signature(init).parameters)[1:]
    public = [name for name in known if not name.startswith("_")]

    @functools.wraps(init)
    def checked_new(made: type[T], *args: Any, **kwargs: Any) -> T:
        unknown = [name for name in kwargs if name not in known]
        if unknown and made.__init__ is init:  # a subclass may have names of its own
            raise ParameterTypeError(unknown_arguments(cls.__name__, unknown, public), parameter=unknown[0])
        return object.__new__(made)

    cls.__new__ = checked_new  # type: ignore[method-assign, assignment]
    return cls


def require_in_vocabulary(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raises TacoValidationError, which names the parameter, if one of `token_ids` is not below `vocab_size`."""
    bad = [token for token in token_ids if not 0 <= token < vocab_size]
    if bad:
        raise TacoValidationError(
            f"token_id {bad[0]} in {name} contains out-of-vocab token id: ids must be in [0, {vocab_size}), "
            f"got {bad[:NUM_SHOWN]}.",
            parameter=name,
            value=bad[0],
        )


def _int_of_text(token_id: Any) -> Any:
    """`token_id` as an int if it is the text of one; else unchanged, for the field's own check to report."""
    try:
        return int(token_id) if isinstance(token_id, str) else token_id
    except ValueError:
        return token_id


def as_processors(value: Any) -> list[Callable[..., Any]]:
    processors = list(value) if isinstance(value, (list, tuple)) else None
    if processors is None or not all(map(callable, processors)):
        raise type_error("logits_processors", "a list of callables", value)
    return processors


def as_logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise type_error("logit_bias", "a dict of token id: bias", value)
    value = {_int_of_text(key): bias for key, bias in value.items()}
    bad_keys = [key for key in value if isinstance(key, bool) or not isinstance(key, numbers.Integral)]
    if bad_keys:
        raise ParameterTypeError(
            f"logit_bias contains key(s) that cannot be converted to integer token IDs: {bad_keys[:20]}; "
            "its keys are token ids as int.",
            parameter="logit_bias",
            value=bad_keys,
        )
    biases = {int(key): as_number("logit_bias", bias) for key, bias in value.items()}
    require(not any(map(math.isnan, biases.values())), "logit_bias", value, "must not contain NaN")
    return {key: min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, bias)) for key, bias in biases.items()}


def as_score_ids(value: Any) -> np.ndarray:
    if isinstance(value, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in value):
        width = max(map(len, value), default=0)
        value = [[*row, *[-1] * (width - len(row))] for row in value]
    try:
        ids = np.asarray(value)
    except ValueError:  # rows of different lengths
        ids = np.empty(0)
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ParameterTypeError(
            "prompt_logprob_token_ids must be a non-empty integer array of shape [num_rows, num_ids] "
            "(-1 pads a row), or a list of lists of integers.",
            parameter="prompt_logprob_token_ids",
            value=value,
        )
    ids = ids.astype(np.int64, order="C")  # a copy, which the caller cannot change any more
    require(bool((ids >= -1).all()), "prompt_logprob_token_ids", ids.min(), "must be token ids, or -1 as padding")
    return ids


def check_extra_ints(value: object) -> None:
    """Integers in extra_args must fit into 64 bits, signed or unsigned, so that they survive serialisation."""
    if isinstance(value, dict):
        for element in value.values():
            check_extra_ints(element)
    elif isinstance(value, (list, tuple)):
        for element in value:
            check_extra_ints(element)
    elif isinstance(value, int):
        require(-(2**63) <= value < 2**64, "extra_args", value, "integers must be in [-2**63, 2**64)")
