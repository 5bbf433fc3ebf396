from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from taco.config import LoadConfig
from taco.engine.llm_engine import _load_tokenizer
from taco.models.loader.source import ModelSource
from taco.tokenizer import loading
from tests.fake_engine import make_config

SOURCE = ModelSource("hf", "/models/model")


@pytest.mark.parametrize(
    ("tokenizer", "tokenizer_revision", "expected"),
    [
        ("org/model", "v1", SOURCE),
        ("org/model", "v2", "org/model"),
        ("org/tokenizer", "v1", "org/tokenizer"),
        ("org/tokenizer", "v2", "org/tokenizer"),
    ],
)
def test_the_tokenizer_is_the_models_own_unless_another_one_or_revision_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tokenizer: str, tokenizer_revision: str, expected: object
) -> None:
    calls: list[tuple[object, dict[str, Any]]] = []
    monkeypatch.setattr(loading, "load_tokenizer", lambda source, **options: calls.append((source, options)))
    config = make_config()
    model = dataclasses.replace(
        config.model_config,
        model="org/model",
        source=SOURCE,
        revision="v1",
        tokenizer=tokenizer,
        tokenizer_revision=tokenizer_revision,
        hf_token="secret",
    )
    _load_tokenizer(dataclasses.replace(config, model_config=model, load_config=LoadConfig(download_dir="/d")))
    [(source, options)] = calls
    assert source == expected
    assert (options["revision"], options["download_dir"], options["hf_token"]) == (tokenizer_revision, "/d", "secret")
