"""Arguments that vLLM has given up, or that taco refuses in all its methods."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.guided.request import read_guided_options, with_constraint
from taco.inputs import split_prompts

P = ParamSpec("P")
R = TypeVar("R")


def positional_is_deprecated(num_positional: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Warns where a constructor gets more than `num_positional` arguments, itself included, without their names.

    The attribute `DEPRECATE_INIT_POSARGS` of its class turns this off.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if len(args) > num_positional and args[0].DEPRECATE_INIT_POSARGS:  # type: ignore[attr-defined]
                warnings.warn(
                    f"The positional arguments {names[num_positional : len(args)]} are deprecated and will be "
                    "removed in a future update. Pass them by name.",
                    DeprecationWarning,
                    stacklevel=2,
                )
            return function(*args, **kwargs)

        return wrapper

    return decorate


def merge_legacy_prompts(prompts: Any, prompt_token_ids: Any, *, warns: bool) -> Any:
    """`prompts`, or what the deprecated `prompt_token_ids` stands for.

    Args:
        warns: `prompt_token_ids` makes a DeprecationWarning, which names the line that called the caller.
    """
    if prompt_token_ids is None:
        if prompts is None:
            raise TacoValidationError("Either prompts or prompt_token_ids must be provided.", parameter="prompts")
        return prompts
    if warns:
        warnings.warn(
            "The keyword argument prompt_token_ids is deprecated; pass token ids as prompts.",
            DeprecationWarning,
            stacklevel=3,
        )
    token_prompts = split_prompts(prompt_token_ids)
    if not token_prompts:
        raise TacoValidationError("please provide at least one prompt", parameter="prompt_token_ids")
    if prompts is None:
        return token_prompts
    texts = split_prompts(prompts)
    if len(texts) != len(token_prompts):
        raise TacoValidationError(
            f"The lengths of prompts and prompt_token_ids must be the same. Got {len(texts)} and {len(token_prompts)}.",
            parameter="prompt_token_ids",
        )
    return texts


def refuse_adapters(prompt_adapter_request: object, mm_processor_kwargs: object = None) -> None:
    """Raises UnsupportedFeatureError for what taco does not have."""
    if prompt_adapter_request is not None:
        raise UnsupportedFeatureError(
            "prompt_adapter_request is not supported: this version of taco does not have prompt adapters.",
            parameter="prompt_adapter_request",
            value=prompt_adapter_request,
        )
    if mm_processor_kwargs:
        raise UnsupportedFeatureError(
            "mm_processor_kwargs is not supported: this version of taco does not have images, audio or video.",
            parameter="mm_processor_kwargs",
            value=mm_processor_kwargs,
        )


def with_guided_options(params: Any, options: object) -> Any:
    """Parameters as the deprecated `guided_options_request` completes them; those of the caller are not changed."""
    warnings.warn(
        "guided_options_request is deprecated; use guided_decoding of SamplingParams.", DeprecationWarning, stacklevel=3
    )
    constraint = read_guided_options(options)
    if constraint.constraint_kind is None:
        return params
    return with_constraint(params, "guided_options_request", guided_decoding=constraint)
