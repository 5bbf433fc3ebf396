"""Which class implements which architecture. To add a model: write its file and name it here."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from taco.errors import TacoValidationError

if TYPE_CHECKING:
    from taco.models.base import Model

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

Use = Literal["generate", "embed", "classify", "reward"]


@dataclass(frozen=True)
class Architecture:
    """What a name in `architectures` stands for.

    Args:
        target: "module:Class".
        use: what the checkpoint is made for.
        is_encoder: whether tokens also see those after them, and nothing is cached.
        seq_pooling_type: how one vector is made of a text where nobody says otherwise.
        is_tokenwise: whether its head is for single tokens, not for a text.
    """

    target: str
    use: Use = "generate"
    is_encoder: bool = False
    seq_pooling_type: str = "LAST"
    is_tokenwise: bool = False


def _encoder(stem: str, target: str) -> dict[str, Architecture]:
    """The bare model of a family of encoders, and what is made of it."""
    embed, classify = Architecture(target, "embed", True, "CLS"), Architecture(target, "classify", True, "CLS")
    return {
        f"{stem}Model": embed,
        f"{stem}ForMaskedLM": embed,
        f"{stem}ForSequenceClassification": classify,
        f"{stem}ForTokenClassification": replace(classify, is_tokenwise=True),
    }


# Models that end in a pooler. Decoders have theirs by rule, see `find_architecture`.
_POOLING_MODELS = {
    **_encoder("Bert", "taco.models.bert:BertForPooling"),
    **_encoder("Camembert", "taco.models.roberta:RobertaForPooling"),
    **_encoder("ModernBert", "taco.models.modernbert:ModernBertForPooling"),
    **_encoder("Roberta", "taco.models.roberta:RobertaForPooling"),
    **_encoder("XLMRoberta", "taco.models.roberta:RobertaForPooling"),
    "Qwen2ForProcessRewardModel": Architecture(_MODELS["Qwen2ForCausalLM"], "reward", is_tokenwise=True),
    "Qwen2ForRewardModel": Architecture(_MODELS["Qwen2ForCausalLM"], "reward", is_tokenwise=True),
}
_POOLING_BY_MODEL_TYPE = {
    "bert": "BertModel",
    "camembert": "CamembertModel",
    "modernbert": "ModernBertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
}
# Endings of the names of decoders with another head than that over the vocabulary.
_DECODER_ENDINGS: dict[str, Use] = {"Model": "embed", "ForSequenceClassification": "classify"}
_GENERATIVE_ENDINGS = ("ForCausalLM", "LMHeadModel")


def supported_architectures() -> list[str]:
    """Names that `architectures` of a configuration may have, those of models that generate text first.

    Decoders have two more each, see `find_architecture`.
    """
    return [*sorted(_MODELS), *sorted(_POOLING_MODELS)]


def find_architecture(hf_config: Any) -> Architecture | None:
    """What a configuration (transformers' `PretrainedConfig`) is, or None if it is not supported.

    A decoder XForCausalLM is also known as XModel, whose hidden states are used as they are, and as
    XForSequenceClassification, with a linear layer `score` on top.
    """
    names = getattr(hf_config, "architectures", None) or [
        _BY_MODEL_TYPE.get(hf_config.model_type) or _POOLING_BY_MODEL_TYPE.get(hf_config.model_type)
    ]
    for name in filter(None, names):
        if name in _MODELS:
            return Architecture(_MODELS[name])
        if name in _POOLING_MODELS:
            return _POOLING_MODELS[name]
        for ending, use in _DECODER_ENDINGS.items():
            if not name.endswith(ending):
                continue
            # Gemma3ForCausalLM is a Gemma3TextModel with a head.
            stem = re.sub("Text$", "", name.removesuffix(ending))
            for generative in _GENERATIVE_ENDINGS:
                if stem + generative in _MODELS:
                    return Architecture(_MODELS[stem + generative], use)
    return None


def known_architecture(hf_config: Any) -> Architecture:
    """`find_architecture`, which must find one.

    Raises:
        TacoValidationError: it does not; the message lists what is supported.
    """
    if (found := find_architecture(hf_config)) is not None:
        _check_model_type(hf_config, found)
        return found
    names = getattr(hf_config, "architectures", None)
    wanted = ", ".join(names or ()) or f"model_type={hf_config.model_type!r}"
    raise TacoValidationError(
        f"The architecture {wanted} is not supported. Supported are: {', '.join(supported_architectures())}.",
        parameter="model",
        value=wanted,
    )


def _check_model_type(hf_config: Any, found: Architecture) -> None:
    """Raises TacoValidationError where `architectures` and `model_type` are those of different models.

    transformers goes by the type, whose configuration may have settings that the architecture knows nothing of.
    """
    own = {**_BY_MODEL_TYPE, **_POOLING_BY_MODEL_TYPE}
    types = {
        model_type
        for model_type, name in own.items()
        if found.target == (_POOLING_MODELS[name].target if name in _POOLING_MODELS else _MODELS.get(name))
    }
    model_type = getattr(hf_config, "model_type", None)
    if types and model_type and model_type not in types:
        raise TacoValidationError(
            f"The configuration names the architecture {', '.join(hf_config.architectures)}, and the "
            f"model_type={model_type!r} of another one. Correct its config.json, or pass "
            'hf_overrides={"architectures": [...]} or {"model_type": ...}.',
            parameter="model",
            value=model_type,
        )


def register_model(architecture: str, target: str) -> None:
    """Adds or replaces the implementation of an architecture.

    Args:
        architecture: its name in the `architectures` of configurations.
        target: "module:Class" of a `Model`; imported when a model of that architecture is first asked for.

    Raises:
        TacoValidationError: `target` has another form.
    """
    module, separator, name = target.partition(":")
    if not (module and separator and name):
        raise TacoValidationError(
            f'target must have the form "module:Class", got {target!r}.', parameter="target", value=target
        )
    _MODELS[architecture] = target


def resolve_model_class(hf_config: Any, use: Use | None = None) -> type[Model]:
    """The class that implements a configuration (transformers' `PretrainedConfig`).

    Args:
        use: what the model is to be used for; None for what the checkpoint is made for.

    Raises:
        TacoValidationError: there is none; the message lists what is supported.
    """
    architecture = known_architecture(hf_config)
    module, _, class_name = architecture.target.partition(":")
    found: type[Model] = getattr(importlib.import_module(module), class_name)
    use = use or architecture.use
    if use == "generate":
        return found
    from taco.models.pooling import pooling_class

    return pooling_class(found, use)
