from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taco.compat import V0_33
from taco.config import LoadConfig, TacoConfig
from taco.engine.arg_utils import EngineArgs
from taco.engine.llm_engine import LLMEngine, _load_tokenizer
from taco.errors import StatsDisabledError, UnsupportedFeatureError
from taco.executor.inprocess import InProcessExecutor
from taco.models.loader.source import ModelSource
from taco.tokenizer import loading
from taco.tokenizer.group import TokenizerGroup
from taco.usage_context import UsageContext
from tests.entrypoints.conftest import tiny_llama_path  # noqa: F401
from tests.fake_engine import make_config
from tests.tiny_tokenizers import byte_level_tokenizer

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


@pytest.mark.parametrize(
    ("tokenizer", "tokenizer_revision", "expected", "revision"),
    [
        (None, None, SOURCE, "v1"),
        ("org/model", "v1", SOURCE, "v1"),
        (None, "v2", "org/model", "v2"),
        ("org/tokenizer", None, "org/tokenizer", "v1"),
    ],
)
def test_tokens_that_are_classes_are_looked_up_in_that_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: str | None,
    tokenizer_revision: str | None,
    expected: object,
    revision: str,
) -> None:
    calls: list[tuple[object, dict[str, Any]]] = []

    def load(source: object, **options: Any) -> Any:
        calls.append((source, options))
        return byte_level_tokenizer()

    monkeypatch.setattr(loading, "load_tokenizer", load)
    args = EngineArgs(
        model="org/model",
        revision="v1",
        tokenizer=tokenizer,
        tokenizer_revision=tokenizer_revision,
        hf_token="secret",
        download_dir="/d",
    )
    assert args._token_ids(["a"], SOURCE) == byte_level_tokenizer().convert_tokens_to_ids(["a"])
    [(source, options)] = calls
    assert source == expected
    assert (options["revision"], options["download_dir"], options["hf_token"]) == (revision, "/d", "secret")


def test_outputs_are_checked_where_that_is_switched_on() -> None:
    assert LLMEngine.validate_outputs(["a", 1], str) == ["a", 1]
    for _ in range(2):
        with pytest.raises(TypeError, match="Expected output of type .*str.*int"), LLMEngine.enable_output_validation():
            assert LLMEngine.validate_output("a", str) == "a"
            LLMEngine.validate_outputs(["a", 1], str)
    assert LLMEngine.validate_output(1, str) == 1


@pytest.fixture(scope="module")
def config(tiny_llama_path: Path) -> TacoConfig:  # noqa: F811
    args = EngineArgs(
        str(tiny_llama_path), dtype="float32", kv_cache_memory_bytes=1 << 20, disable_log_stats=True, max_num_seqs=2
    )
    return args.create_config()


def test_an_engine_is_made_of_its_parts(config: TacoConfig) -> None:
    class Executor(InProcessExecutor):
        pass

    engine = LLMEngine(
        config, Executor, True, UsageContext.LLM_CLASS, None, aggregate_engine_logging=True, multiprocess_mode=True
    )
    assert isinstance(engine.model_executor, Executor)
    assert engine.get_metrics()
    group = engine.get_tokenizer_group()
    assert group.tokenizer is engine.get_tokenizer()
    assert isinstance(engine.tokenizer, TokenizerGroup) and engine.tokenizer.tokenizer is engine.get_tokenizer()
    assert engine.tokenizer.eos_token_id == 1
    with pytest.raises(TypeError, match="tokenizer group"):
        engine.get_tokenizer_group(dict)  # type: ignore[arg-type]
    assert engine.get_decoding_config().guided_decoding_backend == config.guided_decoding_config.backend
    engine.close()
    without = LLMEngine(dataclasses.replace(config, behaviour=V0_33), InProcessExecutor, log_stats=False)
    assert without.tokenizer is without.get_tokenizer()
    assert (without.lora_config, without.stat_loggers) == (None, {})
    assert without.decoding_config is without.get_decoding_config()
    for name in ("detokenizer", "input_preprocessor", "renderer", "engine_core"):
        assert not hasattr(without, name)
        with pytest.raises(UnsupportedFeatureError, match=rf"LLMEngine\.{name} is not supported: "):
            getattr(without, name)
    with pytest.raises(StatsDisabledError):
        without.get_metrics()
    assert without.list_prompt_adapters() == [] and not without.remove_prompt_adapter(1)
    without.do_tracing(None)
    without.create_trace_span(None)
    without.stop_remote_worker_execution_loop()
    calls: dict[str, Callable[[], object]] = {
        "get_metrics": lambda: without.add_logger("name", object()),
        "LoRA": lambda: without.add_lora(object()),
        "Prompt adapters": lambda: without.add_prompt_adapter(object()),
        "prompt_adapter_request": lambda: without.add_request("1", "a", prompt_adapter_request=object()),
    }
    for what, call in calls.items():
        with pytest.raises(UnsupportedFeatureError, match=what):
            call()
    without.close()


@pytest.mark.parametrize("name", ["stat_loggers", "input_registry", "mm_registry"])
def test_parts_that_do_not_exist_are_refused_before_the_model_is_loaded(config: TacoConfig, name: str) -> None:
    def no_executor(*_: object) -> None:
        raise AssertionError

    with pytest.raises(UnsupportedFeatureError, match=name):
        LLMEngine(config, no_executor, False, **{name: object()})  # type: ignore[arg-type]
