"""One model that is nowhere: what `EngineArgs.create_config` asks of taco.models.loader.source."""

from __future__ import annotations

import types
from typing import Any

import pytest

from taco.config import TacoConfig
from taco.engine.arg_utils import EngineArgs
from taco.models.loader import source


class FakeConfig(types.SimpleNamespace):
    """What create_config reads of a Hugging Face config."""

    def __init__(self, **values: Any) -> None:
        defaults = {"model_type": "llama", "vocab_size": 1000, "max_position_embeddings": 4096, "dtype": None}
        defaults |= {"hidden_size": 64, "architectures": None}
        super().__init__(**{**defaults, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **values})

    def get_text_config(self) -> FakeConfig:
        return self


class FakeSource:
    """Stands for the functions of taco.models.loader.source: one model, and a record of what was asked of them."""

    def __init__(self) -> None:
        self.config_values: dict[str, Any] = {}
        self.generation_config: dict[str, Any] = {}
        self.kind: Any = "hf"
        self.calls: list[Any] = []

    def resolve_model(self, model: str, **options: Any) -> source.ModelSource:
        self.calls.append((model, options))
        return source.ModelSource(self.kind, "/models/fake")

    def load_hf_config(self, model: source.ModelSource, **options: Any) -> FakeConfig:
        self.calls.append(options)
        return FakeConfig(**self.config_values)

    def load_generation_config(self, model: Any, hf_config: Any = None) -> dict[str, Any]:
        if self.generation_config and isinstance(model, source.ModelSource):
            return dict(self.generation_config)
        return REAL_LOADER(model, hf_config)


REAL_LOADER = source.load_generation_config


def install(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    """Puts a fake in the place of the functions until the test ends."""
    fake = FakeSource()
    for name in ("resolve_model", "load_hf_config", "load_generation_config"):
        monkeypatch.setattr(source, name, getattr(fake, name))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return fake


def create(**values: Any) -> TacoConfig:
    return EngineArgs(**{"model": "fake", "device": "cpu", "dtype": "float32", **values}).create_config()
