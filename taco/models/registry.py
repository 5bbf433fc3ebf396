"""Which class implements which architecture. To add a model: write its file and name it here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from taco.errors import TacoValidationError

if TYPE_CHECKING:
    from taco.models.base import CausalLM

# Name in a configuration's `architectures` -> "module:class", imported only when it is used.
_MODELS = {
    "GPT2LMHeadModel": "taco.models.gpt2:GPT2LMHeadModel",
    "Gemma3ForCausalLM": "taco.models.gemma3:Gemma3ForCausalLM",
    "LlamaForCausalLM": "taco.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "taco.models.mistral:MistralForCausalLM",
    "OPTForCausalLM": "taco.models.opt:OPTForCausalLM",
    "Phi3ForCausalLM": "taco.models.phi3:Phi3ForCausalLM",
    "Qwen2ForCausalLM": "taco.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "taco.models.qwen3:Qwen3ForCausalLM",
}
# For configurations without `architectures`: their model_type -> architecture.
_BY_MODEL_TYPE = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "opt": "OPTForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def supported_architectures() -> list[str]:
    """Names that `architectures` of a configuration may have."""
    return sorted(_MODELS)


def register_model(architecture: str, target: str) -> None:
    """Adds or replaces the implementation of an architecture.

    Args:
        architecture: its name in the `architectures` of configurations.
        target: "module:Class" of a `CausalLM`; imported when a model of that architecture is first asked for.

    Raises:
        TacoValidationError: `target` has another form.
    """
    module, separator, name = target.partition(":")
    if not (module and separator and name):
        raise TacoValidationError(
            f'target must have the form "module:Class", got {target!r}.', parameter="target", value=target
        )
    _MODELS[architecture] = target


def resolve_model_class(hf_config: Any) -> type[CausalLM]:
    """The class that implements a configuration (transformers' `PretrainedConfig`).

    Raises:
        TacoValidationError: there is none; the message lists what is supported.
    """
    names = getattr(hf_config, "architectures", None) or [_BY_MODEL_TYPE.get(hf_config.model_type)]
    for name in names:
        if name in _MODELS:
            module, _, class_name = _MODELS[name].partition(":")
            return getattr(importlib.import_module(module), class_name)
    wanted = ", ".join(name for name in names if name) or f"model_type={hf_config.model_type!r}"
    raise TacoValidationError(
        f"The architecture {wanted} is not supported. Supported are: {', '.join(supported_architectures())}.",
        parameter="model",
        value=wanted,
    )
