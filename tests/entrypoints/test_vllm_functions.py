from __future__ import annotations

import argparse
import logging
import random
import re
import socket
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from taco.engine.arg_utils import EngineArgs
from taco.entrypoints import vllm_functions
from taco.entrypoints.vllm_functions import (
    FlexibleArgumentParser,
    ModelRegistry,
    get_tokenizer,
    resolve_chat_template,
    set_random_seed,
)
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models import registry
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level_tokenizer


def test_a_tokenizer_is_loaded_with_the_options_of_its_class(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    tokenizer = get_tokenizer(
        tmp_path, tokenizer_mode="auto", trust_remote_code=False, revision=None, padding_side="left"
    )
    assert tokenizer("hello")["input_ids"] == byte_level_tokenizer()("hello")["input_ids"]
    assert tokenizer.padding_side == "left"


def test_the_chat_template_is_the_argument_else_the_engines_else_the_tokenizers() -> None:
    tokenizer = byte_level_tokenizer()
    plain = types.SimpleNamespace(chat_template=None)
    with_template = types.SimpleNamespace(chat_template="{{ engine }}")
    assert resolve_chat_template(tokenizer, "{{ mine }}", None, model_config=with_template) == "{{ mine }}"
    assert resolve_chat_template(tokenizer, None, None, model_config=with_template) == "{{ engine }}"
    assert resolve_chat_template(tokenizer, None, [{}], model_config=plain) == CHAT_TEMPLATE
    assert resolve_chat_template(tokenizer=tokenizer, trust_remote_code=True) == CHAT_TEMPLATE
    assert resolve_chat_template(byte_level_tokenizer(None)) is None


def test_flags_may_have_underscores() -> None:
    parser = FlexibleArgumentParser()
    group = parser.add_argument_group("engine")
    EngineArgs.add_cli_args(group)  # as vLLM's examples do
    group.set_defaults(model="m")
    parser.add_argument("--my_own")
    args = parser.parse_args(
        ["--max_model_len", "77", "--served_model_name=a_b", "--no-enforce_eager", "--my_own", "a_b"]
    )
    assert (args.max_model_len, args.served_model_name, args.enforce_eager) == (77, ["a_b"], False)
    assert args.my_own == "a_b"
    assert EngineArgs(**{key: value for key, value in vars(args).items() if key != "my_own"}).max_model_len == 77


def test_models_are_listed_and_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    assert "LlamaForCausalLM" in ModelRegistry.get_supported_archs()
    ModelRegistry.register_model("MyModel", "taco.models.llama:LlamaForCausalLM")
    from taco.models.llama import LlamaForCausalLM

    class Derived(LlamaForCausalLM):
        pass

    monkeypatch.setattr(vllm_functions, "Derived", Derived, raising=False)
    Derived.__module__, Derived.__qualname__ = vllm_functions.__name__, "Derived"
    ModelRegistry.register_model("Derived", Derived)
    assert {"MyModel", "Derived"} <= ModelRegistry.get_supported_archs()
    assert registry.resolve_model_class(types.SimpleNamespace(architectures=["MyModel"])) is LlamaForCausalLM
    assert registry.resolve_model_class(types.SimpleNamespace(architectures=["Derived"])) is Derived


def test_a_model_class_of_vllm_is_refused() -> None:
    with pytest.raises(TacoValidationError, match="Namespace is not one of taco's model classes"):
        ModelRegistry.register_model("Foreign", argparse.Namespace)


def test_the_registry_says_what_architectures_are_made_for() -> None:
    registry = vllm_functions.ModelRegistry
    assert registry.is_text_generation_model("LlamaForCausalLM")
    assert not registry.is_pooling_model(["Unknown", "LlamaForCausalLM"], None)
    assert registry.is_pooling_model(["BertModel"]) and not registry.is_text_generation_model(["BertModel"])
    assert not registry.is_multimodal_model("LlamaForCausalLM")
    for unknown in ("Unknown", []):
        with pytest.raises(TacoValidationError, match="does not know"):
            registry.is_multimodal_model(unknown)


def test_the_registry_finds_the_class_of_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    models = vllm_functions._ModelRegistry({"MineForCausalLM": "taco.models.llama:LlamaForCausalLM"})
    from taco.models.llama import LlamaForCausalLM

    assert models.resolve_model_cls(["Unknown", "MineForCausalLM"]) == (LlamaForCausalLM, "MineForCausalLM")
    architecture, name = models.inspect_model_cls("BertForSequenceClassification", None)
    assert (architecture.use, architecture.is_encoder, name) == ("classify", True, "BertForSequenceClassification")
    assert models.is_cross_encoder_model("BertForSequenceClassification")
    assert models.is_cross_encoder_model("LlamaForSequenceClassification")
    for other in ("BertForTokenClassification", "BertModel", "LlamaForCausalLM"):
        assert not models.is_cross_encoder_model(other)
    for question in ("is_attention_free_model", "is_hybrid_model", "model_has_inner_state", "is_pp_supported_model"):
        assert getattr(models, question)("LlamaForCausalLM") is False
        with pytest.raises(TacoValidationError, match="does not know"):
            getattr(models, question)("Unknown")


def test_ray_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="Ray is not supported"):
        vllm_functions.initialize_ray_cluster(object())


def test_loggers_are_the_programs_own() -> None:
    assert vllm_functions.init_logger("a.b") is logging.getLogger("a.b")


def test_addresses_and_ports_can_be_listened_on() -> None:
    with socket.socket() as listener:
        listener.bind((vllm_functions.get_ip(), vllm_functions.get_open_port()))


def test_all_generators_are_seeded() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    set_random_seed(2**40 + 3)
    first = draw()
    set_random_seed(2**40 + 3)
    set_random_seed(None)
    assert draw() == first != draw()


def test_ids_are_random_hexadecimal_digits() -> None:
    ids = {vllm_functions.random_uuid() for _ in range(100)}
    assert len(ids) == 100 and all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
