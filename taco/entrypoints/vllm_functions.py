"""Functions and classes around an engine that programs written for vLLM import."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import socket
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from taco.errors import TacoValidationError, refused
from taco.models.registry import (
    Architecture,
    find_architecture,
    register_model,
    resolve_model_class,
    supported_architectures,
)
from taco.tokenizer.loading import add_vocabulary_limits, load_tokenizer


def get_tokenizer(
    tokenizer_name: str | os.PathLike[str],
    *,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    download_dir: str | None = None,
    **kwargs: Any,
) -> Any:
    """Loads a tokenizer as an engine would, with `max_token_id` and `max_chars_per_token` as in vLLM.

    Args:
        tokenizer_name: folder, .gguf file or hub id.
        tokenizer_mode, trust_remote_code, revision, download_dir: as the arguments of `LLM`; the revision is that of
            the tokenizer.
        kwargs: passed on to the tokenizer's class.

    Raises:
        TacoValidationError: there is no such tokenizer, or it cannot be built.
    """
    tokenizer = load_tokenizer(
        os.fspath(tokenizer_name),
        tokenizer_mode=tokenizer_mode,
        trust_remote_code=trust_remote_code,
        revision=revision,
        download_dir=download_dir,
        **kwargs,
    )
    add_vocabulary_limits(tokenizer)
    return tokenizer


def set_random_seed(seed: int | None) -> None:
    """Seeds the generators of Python, NumPy and torch, of which taco itself uses none; None leaves them as they are."""
    if seed is not None:
        import numpy as np
        import torch

        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)


def resolve_chat_template(
    tokenizer: Any,
    chat_template: str | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
    *,
    trust_remote_code: bool | None = None,
    model_config: Any = None,
) -> str | None:
    """The text of the chat template that a tokenizer would use; None where it has none.

    Args:
        chat_template: text of a template, or the name of one of the tokenizer's.
        tools: tools that the conversations mention; some tokenizers have another template for them.
        trust_remote_code: without effect; the tokenizer is loaded already.
        model_config: that of the engine, whose `chat_template` stands in for the tokenizer's.
    """
    default = None if model_config is None else model_config.chat_template
    try:
        template: str = tokenizer.get_chat_template(chat_template or default, None if tools is None else list(tools))
    except (ValueError, NotImplementedError):  # tokenizers of mistral-common have none
        return None
    return template


def destroy_model_parallel() -> None:
    """Does nothing: an engine on one device makes no process groups. `LLM.close` gives memory back."""


def destroy_distributed_environment() -> None:
    """Does nothing, as `destroy_model_parallel`."""


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Collects garbage, so that engines which nobody refers to any more give their memory back.

    Args:
        shutdown_ray: without effect; taco starts no Ray.
    """
    gc.collect()


def init_logger(name: str) -> logging.Logger:
    """The logger of that name; the program sets it up."""
    return logging.getLogger(name)


def get_ip() -> str:
    """An address by which other machines reach this one; that of the machine itself where it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation: nothing is sent, but a route is chosen
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
    return address


def get_open_port() -> int:
    """A port on which nobody listens at the moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
    return port


def random_uuid() -> str:
    """32 hexadecimal digits that nobody else uses: the id of a request, say."""
    return uuid.uuid4().hex


@refused
def trainer_init(*args: object, **kwargs: object) -> None:
    """Weights from another process are not supported; give update_weights() of an LLM in the trainer its tensors."""


@refused
def packed_nccl_broadcast_producer(*args: object, **kwargs: object) -> None:
    """Weights from another process are not supported; give update_weights() of an LLM in the trainer its tensors."""


@refused
def initialize_ray_cluster(parallel_config: object, ray_address: str | None = None) -> None:
    """Running on Ray is not supported; start several processes, each with a part of the prompts."""


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose long flags may be written with underscores for dashes: `--max_model_len`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([self._as_defined(argument) for argument in given], namespace)

    def _as_defined(self, argument: str) -> str:
        flag, separator, value = argument.partition("=")
        is_defined = not flag.startswith("--") or flag in self._option_string_actions
        return argument if is_defined else flag.replace("_", "-") + separator + value


Names = str | list[str]  # of an architecture, or the `architectures` of a configuration


@dataclass(eq=False)
class _ModelRegistry:
    """The models that taco knows, by the names in the `architectures` of their configurations.

    Methods that ask about an architecture take its name, or the `architectures` of a configuration, of which the first
    that is known counts; `model_config` has no effect, as the names say it all. They raise TacoValidationError where
    none is known.

    Args:
        models: implementations to add, see `register_model`.
    """

    models: dict[str, type | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for architecture, model_class in self.models.items():
            self.register_model(architecture, model_class)

    def get_supported_archs(self) -> set[str]:
        """Names of the architectures that can be loaded."""
        return set(supported_architectures())

    def register_model(self, model_arch: str, model_cls: type | str) -> None:
        """Adds or replaces the implementation of an architecture.

        Args:
            model_arch: its name in configurations.
            model_cls: a class with the interface of taco's models (`taco.models.base`), not that of vLLM's; or
                "module:Class", imported when such a model is first loaded.

        Raises:
            TacoValidationError: it is neither.
        """
        if isinstance(model_cls, type):
            if not any(base.__module__ == "taco.models.base" for base in model_cls.__mro__):
                raise TacoValidationError(
                    f"{model_cls.__qualname__} is not one of taco's model classes: the interface of vLLM's models is "
                    "another one. Derive it from a class of taco.models.base (docs/architecture.md, How to add).",
                    parameter="model_cls",
                    value=model_cls,
                )
            model_cls = f"{model_cls.__module__}:{model_cls.__qualname__}"
        register_model(model_arch, model_cls)

    def inspect_model_cls(self, architectures: Names, model_config: object = None) -> tuple[Architecture, str]:
        """What an architecture is, and its name."""
        return _inspect(architectures)

    def resolve_model_cls(self, architectures: Names, model_config: object = None) -> tuple[type, str]:
        """The class that implements an architecture, and the name of that."""
        _, name = _inspect(architectures)
        return resolve_model_class(SimpleNamespace(architectures=[name])), name

    def is_text_generation_model(self, architectures: Names, model_config: object = None) -> bool:
        """Whether models of that architecture are made to generate text."""
        return _inspect(architectures)[0].use == "generate"

    def is_pooling_model(self, architectures: Names, model_config: object = None) -> bool:
        """Whether they are made for pooling, which others can do too."""
        return _inspect(architectures)[0].use != "generate"

    def is_cross_encoder_model(self, architectures: Names, model_config: object = None) -> bool:
        """Whether they can score pairs of texts, which those with one class do."""
        architecture = _inspect(architectures)[0]
        return architecture.use == "classify" and not architecture.is_tokenwise

    def _is_none(self, architectures: Names, model_config: object = None) -> bool:
        """False: all of them have attention, and no other state, in every layer, read text alone, on one device."""
        _inspect(architectures)
        return False

    is_attention_free_model = is_hybrid_model = is_noops_model = model_has_inner_state = _is_none
    is_multimodal_model = is_multimodal_raw_input_only_model = _is_none
    is_transcription_model = is_transcription_only_model = _is_none
    is_pp_supported_model = is_hc_sp_supported_model = _is_none


def _inspect(names: Names) -> tuple[Architecture, str]:
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if (found := find_architecture(SimpleNamespace(architectures=[name]))) is not None:
            return found, name
    raise TacoValidationError(
        f"taco does not know the architecture {' or '.join(names)}; ModelRegistry.get_supported_archs() names "
        "those it knows.",
        parameter="architectures",
        value=names,
    )


ModelRegistry = _ModelRegistry()
