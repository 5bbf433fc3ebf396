"""EngineArgs: the names of both vLLM versions, what becomes of each, and how they resolve to configs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taco import compat
from taco.compat import V0_6, V0_33
from taco.config import GuidedDecodingConfig, ProfilerConfig, ReasoningConfig, TacoConfig
from taco.engine import arg_utils
from taco.engine.arg_utils import (
    AsyncEngineArgs,
    EngineArgs,
    Immaterial,
    Implemented,
    NotBuilt,
    resolve_swap_space_bytes,
    treatment_of,
)
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.guided.request import StructuredOutputsConfig
from taco.models.loader import source
from taco.pooling_params import PoolerConfig
from taco.usage_context import UsageContext
from taco.watermark import WatermarkConfig

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "engine_args_fields.json").read_text(encoding="utf-8"))
FIELDS = {field.name: field for field in dataclasses.fields(AsyncEngineArgs)}
IMPLEMENTED = {name: field for name, field in FIELDS.items() if isinstance(treatment_of(field), Implemented)}
IMMATERIAL = {name: field for name, field in FIELDS.items() if isinstance(treatment_of(field), Immaterial)}
NOT_BUILT = {name: field for name, field in FIELDS.items() if isinstance(treatment_of(field), NotBuilt)}


class FakeConfig(types.SimpleNamespace):
    """What create_config reads of a Hugging Face config."""

    def __init__(self, **values: Any) -> None:
        defaults = {"model_type": "llama", "vocab_size": 1000, "max_position_embeddings": 4096, "dtype": None}
        defaults |= {"hidden_size": 64, "architectures": None}
        super().__init__(**{**defaults, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **values})

    def get_text_config(self) -> FakeConfig:
        return self


class FakeLoader:
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


@pytest.fixture(autouse=True)
def loader(monkeypatch: pytest.MonkeyPatch) -> FakeLoader:
    fake = FakeLoader()
    for name in ("resolve_model", "load_hf_config", "load_generation_config"):
        monkeypatch.setattr(source, name, getattr(fake, name))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return fake


def create(**values: Any) -> TacoConfig:
    return EngineArgs(**{"model": "fake", "device": "cpu", "dtype": "float32", **values}).create_config()


# ----------------------------------------------------------------------------------------------------------------------
# Names and treatments
# ----------------------------------------------------------------------------------------------------------------------

# Defaults that are not those of the reference, and why.
OWN_DEFAULTS = {
    "logprobs_mode",  # None: the preset decides
    "ignore_patterns",  # None, as in 0.6.6: the loader knows what it needs
    "swap_space",  # None: the device decides
    "guided_decoding_backend",  # "auto", as in 0.33: the request decides
}


@pytest.mark.parametrize("version", REFERENCE)
@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
def test_every_name_of_both_versions_is_a_field(version: str, cls: type[EngineArgs]) -> None:
    expected = {name for name, _ in REFERENCE[version][cls.__name__]}
    assert expected <= {field.name for field in dataclasses.fields(cls)}


def test_positional_order_is_that_of_0_6() -> None:
    expected = [name for name, _ in REFERENCE["0.6.6.post1"]["EngineArgs"]]
    assert list(FIELDS)[: len(expected)] == expected


def test_defaults_are_those_of_0_6_and_of_0_33_for_its_new_names() -> None:
    reference: dict[str, Any] = {}
    for version in ("0.33.0", "0.6.6.post1"):
        reference |= dict(REFERENCE[version]["EngineArgs"])
    for name, default in reference.items():
        if name in OWN_DEFAULTS or (isinstance(default, dict) and "expression" in default):
            continue
        assert FIELDS[name].default == (default if default not in ({}, []) else None), name


def test_every_field_has_exactly_one_treatment_that_says_something() -> None:
    assert len(IMPLEMENTED) + len(IMMATERIAL) + len(NOT_BUILT) == len(FIELDS)
    texts = [treatment_of(field).help for field in IMPLEMENTED.values()]
    texts += [treatment_of(field).reason for field in IMMATERIAL.values()]
    texts += [treatment_of(field).feature for field in NOT_BUILT.values()]
    assert all(len(text) > 3 for text in texts)


def test_vars_is_a_keyword_set() -> None:
    args = EngineArgs("some/model", max_num_seqs=3)
    assert EngineArgs(**vars(args)) == args


def test_unknown_name_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_num_sequences"):
        EngineArgs(max_num_sequences=3)  # type: ignore[call-arg]


def test_importing_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, taco.engine.arg_utils; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------------------------------
# What is not built
# ----------------------------------------------------------------------------------------------------------------------


def other_value(default: Any) -> Any:
    """A value of the kind of `default` that asks for something."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 2
    return "something"


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_not_built_raises_by_name_before_a_model_is_looked_for(name: str, loader: FakeLoader) -> None:
    value = other_value(FIELDS[name].default)
    with pytest.raises(UnsupportedFeatureError) as caught:
        AsyncEngineArgs(**{"device": "cpu", name: value}).create_config()
    assert f"{name}={value!r}" in str(caught.value)
    assert repr(FIELDS[name].default) in str(caught.value)
    assert caught.value.parameter == name and caught.value.value == value
    assert loader.calls == []


def test_neutral_values_of_either_version_pass() -> None:
    neutral = {
        "speculative_config": {},
        "pooler_config": None,
        "model_impl": "vllm",
        "distributed_executor_backend": "uni",
    }
    assert create(**neutral, data_parallel_size_local=1, logits_processors=[], worker_use_ray=False) == create()


def test_false_is_not_taken_for_zero() -> None:
    with pytest.raises(UnsupportedFeatureError, match="cpu_offload_gb=False"):
        create(cpu_offload_gb=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", "translate"),
        ("runner", "draft"),
        ("convert", "reward"),
        ("load_format", "tensorizer"),
        ("kv_cache_dtype", "fp8"),
        ("quantization", "awq"),
        ("tensor_parallel_size", 2),
        ("tokenizer_mode", "spacy"),
        ("block_size", 12),
        ("dtype", "float64"),
    ],
)
def test_unknown_choice_names_those_that_work(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"{name}={value!r}: taco supports ") as caught:
        create(**{name: value})
    assert repr(IMPLEMENTED[name].metadata["treatment"].rule.values[0]) in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# What is immaterial
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMMATERIAL)
def test_immaterial_values_change_nothing(name: str) -> None:
    expected = create()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        args = AsyncEngineArgs(model="fake", device="cpu", dtype="float32", **{name: other_value(FIELDS[name].default)})
        assert args.create_config() == expected


OBSOLETE = [name for name, field in IMMATERIAL.items() if treatment_of(field).obsolete]


@pytest.mark.parametrize("name", OBSOLETE)
def test_obsolete_names_warn_when_they_are_used(name: str) -> None:
    args = AsyncEngineArgs(model="fake", device="cpu", dtype="float32", **{name: other_value(FIELDS[name].default)})
    with pytest.warns(DeprecationWarning, match=f"{name} has no effect"):
        args.create_config()


def test_defaults_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create()


# ----------------------------------------------------------------------------------------------------------------------
# What is implemented: a value other than the default for each field, and the command line for it
# ----------------------------------------------------------------------------------------------------------------------

EXAMPLES: dict[str, tuple[list[str], Any]] = {
    "model": (["org/name"], "org/name"),
    "served_model_name": (["a", "b"], ["a", "b"]),
    "tokenizer": (["org/tokenizer"], "org/tokenizer"),
    "task": (["embed"], "embed"),
    "skip_tokenizer_init": ([], True),
    "tokenizer_mode": (["slow"], "slow"),
    "trust_remote_code": ([], True),
    "download_dir": (["/tmp/x"], "/tmp/x"),
    "load_format": (["dummy"], "dummy"),
    "config_format": (["hf"], "hf"),
    "dtype": (["bfloat16"], "bfloat16"),
    "kv_cache_dtype": (["auto"], "auto"),
    "seed": (["-5"], -5),
    "max_model_len": (["1k"], 1000),
    "pipeline_parallel_size": (["1"], 1),
    "tensor_parallel_size": (["1"], 1),
    "data_parallel_size": (["1"], 1),
    "block_size": (["32"], 32),
    "enable_prefix_caching": (["no"], False),
    "disable_sliding_window": ([], True),
    "swap_space": (["0.5"], 0.5),
    "gpu_memory_utilization": (["0.5"], 0.5),
    "max_num_batched_tokens": (["4K"], 4096),
    "max_num_seqs": (["7"], 7),
    "max_logprobs": (["-1"], -1),
    "revision": (["main"], "main"),
    "code_revision": (["main"], "main"),
    "rope_scaling": (
        ['{"rope_type": "yarn", "factor": 2.0}'],
        {"rope_type": "yarn", "factor": 2.0},
    ),
    "rope_theta": (["5e5"], 5e5),
    "hf_overrides": (['{"vocab_size": 8}'], {"vocab_size": 8}),
    "tokenizer_revision": (["main"], "main"),
    "quantization": (["gguf"], "gguf"),
    "enforce_eager": ([], True),
    "max_seq_len_to_capture": (["16"], 16),
    "device": (["cpu"], "cpu"),
    "num_gpu_blocks_override": (["9"], 9),
    "ignore_patterns": (["*.bin", "original/*"], ["*.bin", "original/*"]),
    "preemption_mode": (["recompute"], "recompute"),
    "enable_chunked_prefill": (["no"], False),
    "disable_async_output_proc": ([], True),
    "scheduling_policy": (["priority"], "priority"),
    "generation_config": (["auto"], "auto"),
    "override_pooler_config": (['{"pooling_type": "MEAN"}'], PoolerConfig(pooling_type="MEAN")),
    "pooler_config": (['{"pooling_type": "CLS"}'], PoolerConfig(pooling_type="CLS")),
    "runner": (["pooling"], "pooling"),
    "convert": (["embed"], "embed"),
    "kv_cache_memory_bytes": (["1.5g"], 1_500_000_000),
    "long_prefill_token_threshold": (["64"], 64),
    "logprobs_mode": (["raw_logits"], "raw_logits"),
    "hf_token": (["secret"], "secret"),
    "override_generation_config": (['{"top_k": 3}'], {"top_k": 3}),
    "async_scheduling": ([], True),
    "chat_template": (["{{ messages }}"], "{{ messages }}"),
    "compat_version": (["0.33"], "0.33"),
    "disable_log_stats": ([], True),
    "worker_extension_cls": (["some.module.Class"], "some.module.Class"),
    "guided_decoding_backend": (["outlines"], "outlines"),
    "structured_outputs_config": (
        ['{"backend": "guidance", "disable_any_whitespace": true}'],
        StructuredOutputsConfig("guidance", disable_any_whitespace=True),
    ),
    "distributed_executor_backend": (["external_launcher"], "external_launcher"),
    "logits_processors": (
        ["tests.worker.sampler.test_batch_processors:Forbidding"],
        ["tests.worker.sampler.test_batch_processors:Forbidding"],
    ),
    "profiler_config": (['{"torch_profiler_dir": "x"}'], ProfilerConfig(torch_profiler_dir="x")),
    "reasoning_parser": (["qwen3"], "qwen3"),
    "reasoning_config": (
        ['{"reasoning_start_str": "a", "reasoning_end_str": "b"}'],
        ReasoningConfig(reasoning_start_str="a", reasoning_end_str="b"),
    ),
    "watermark_config": (['{"key": 5}'], WatermarkConfig(key=5)),
}

# Fields of which every supported value means the same here; other values raise.
ONE_MEANING = {"config_format", "kv_cache_dtype", "device", "distributed_executor_backend", "quantization"}
ONE_MEANING |= {"pipeline_parallel_size", "tensor_parallel_size", "data_parallel_size"}


def flags(name: str) -> list[str]:
    arguments, _ = EXAMPLES[name]
    flag = name.replace("_", "-")
    return [f"--no-{flag}"] if arguments == ["no"] else [f"--{flag}", *arguments]


def parse(command_line: list[str]) -> EngineArgs:
    return EngineArgs.from_cli_args(EngineArgs.add_cli_args(argparse.ArgumentParser()).parse_args(command_line))


def test_every_implemented_field_has_an_example() -> None:
    assert set(EXAMPLES) == set(IMPLEMENTED)


def test_empty_command_line_gives_the_defaults() -> None:
    assert parse([]) == EngineArgs()


@pytest.mark.parametrize("name", EXAMPLES)
def test_command_line_sets_the_field_and_nothing_else(name: str) -> None:
    assert parse(flags(name)) == EngineArgs(**{name: EXAMPLES[name][1]})


def test_namespace_may_hold_other_things_and_lack_some() -> None:
    namespace = argparse.Namespace(max_num_seqs=5, command="generate")
    assert EngineArgs.from_cli_args(namespace) == EngineArgs(max_num_seqs=5)


@pytest.mark.parametrize(
    "command_line",
    [
        ["--max-num-seqs", "0"],
        ["--max-num-seqs", "some"],
        ["--dtype", "int8"],
        ["--tensor-parallel-size", "2"],
        ["--hf-overrides", "[1]"],
        ["--hf-overrides", "{"],
        ["--gpu-memory-utilization", "nan"],
        ["--lora-dtype", "auto"],
    ],
)
def test_wrong_command_line_ends_with_a_message(command_line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(command_line)
    assert command_line[0] in capsys.readouterr().err


# On a CPU nothing overlaps, unless async_scheduling asks for it: see test_async_scheduling.
ONE_MEANING |= {"disable_async_output_proc"}


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - ONE_MEANING))
def test_no_implemented_field_is_ignored(name: str, loader: FakeLoader) -> None:
    loader.config_values = {"sliding_window": 512}
    loader.generation_config = {"temperature": 0.5}
    expected, expected_calls = create(), list(loader.calls)
    loader.calls.clear()
    alongside = {"task": "embed"} if "pooler_config" in name else {}
    config = create(**{name: EXAMPLES[name][1]}, **alongside)
    if alongside:
        expected = create(**alongside)
    assert config != expected or loader.calls != expected_calls


# ----------------------------------------------------------------------------------------------------------------------
# Values and errors
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "wording"),
    [
        ("max_num_seqs", 0, "must be an integer of at least 1"),
        ("max_num_seqs", True, "must be an integer"),
        ("max_num_seqs", 2.0, "must be an integer"),
        ("max_model_len", -2, "must be an integer of at least 1 .* or 'auto'"),
        ("max_model_len", "4 thousand", "must be an integer"),
        ("seed", None, "must be an integer"),
        ("seed", 2**64, "must be an integer from"),
        ("gpu_memory_utilization", 0.0, "must be a number above 0 and at most 1"),
        ("gpu_memory_utilization", 1.5, "must be a number above 0 and at most 1"),
        ("gpu_memory_utilization", float("nan"), "must be a number"),
        ("swap_space", -1, "must be a number of at least 0"),
        ("swap_space", True, "must be a number"),
        ("swap_space", 10**400, "must be a number"),
        ("enforce_eager", 1, "must be True or False"),
        ("model", "", "must be a text"),
        ("model", None, "must be a text"),
        ("hf_overrides", "{}", "must be a dict or a callable"),
        ("served_model_name", [3], "must be a text or a list of texts"),
        ("compat_version", "0.9", "0.9"),
        ("rope_scaling", {"factor": 2.0}, "rope_type"),
    ],
)
def test_wrong_value_is_named(name: str, value: Any, wording: str) -> None:
    with pytest.raises(TacoValidationError, match=wording) as caught:
        create(**{name: value})
    assert not isinstance(caught.value, UnsupportedFeatureError)


def test_all_wrong_arguments_are_listed_at_once() -> None:
    with pytest.raises(TacoValidationError) as caught:
        create(max_num_seqs=0, enable_lora=True, swap_space="4", async_scheduling=True, disable_async_output_proc=True)
    message = str(caught.value)
    assert "4 engine arguments" in message
    assert all(name in message for name in ("max_num_seqs=0", "enable_lora=True", "swap_space='4'", "contradict"))
    assert not isinstance(caught.value, UnsupportedFeatureError)


def test_only_unsupported_arguments_raise_that_error_together() -> None:
    with pytest.raises(UnsupportedFeatureError) as caught:
        create(enable_lora=True, speculative_model="draft")
    assert "enable_lora" in str(caught.value) and "speculative_model" in str(caught.value)


def test_wrong_arguments_about_the_model_are_listed_at_once(loader: FakeLoader) -> None:
    loader.config_values = {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(TacoValidationError) as caught:
        create(max_model_len=5000)
    assert "awq" in str(caught.value) and "max_model_len=5000" in str(caught.value)


def test_an_unknown_architecture_comes_before_what_depends_on_it(loader: FakeLoader) -> None:
    loader.config_values = {"architectures": ["MambaForCausalLM"], "max_position_embeddings": None}
    with pytest.raises(TacoValidationError, match="MambaForCausalLM is not supported.*: GPT2LMHeadModel, ") as caught:
        create()
    assert "max_model_len" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "wording"),
    [
        ({"quantization": "gguf", "load_format": "pt"}, "load_format"),
        ({"preemption_mode": "swap", "swap_space": 0}, "swap_space"),
        ({"enable_chunked_prefill": False, "long_prefill_token_threshold": 5}, "long_prefill_token_threshold"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 100}, "at least max_model_len \\(4096\\)"),
        ({"quantization": "gguf"}, "needs a .gguf file"),
    ],
)
def test_contradictions_are_errors(values: dict[str, Any], wording: str) -> None:
    with pytest.raises(TacoValidationError, match=wording):
        create(**values)


def test_values_may_be_changed_until_they_are_used() -> None:
    args = EngineArgs(model="fake", device="cpu", max_num_seqs=0)
    args.max_num_seqs = 3
    assert args.create_config().scheduler_config.max_num_seqs == 3


def test_creating_a_config_leaves_the_arguments_alone() -> None:
    args = EngineArgs(model="fake", device="cpu", max_model_len="1k", served_model_name=["a"])
    before = dict(vars(args))
    args.create_config()
    assert vars(args) == before


def test_token_is_not_shown(loader: FakeLoader) -> None:
    args = EngineArgs(model="fake", device="cpu", hf_token="very-secret")
    config = args.create_config()
    assert "very-secret" not in repr(args) + repr(config)
    assert config.model_config.hf_token == "very-secret"
    assert loader.calls[0][1]["hf_token"] == "very-secret"


@given(st.integers(1, 10**6), st.sampled_from("kmgKMG"))
def test_scaled_integers(number: int, suffix: str) -> None:
    rule = arg_utils.Integer(minimum=1, scaled=True)
    base = 1000 if suffix.islower() else 1024
    assert rule.check(f"{number}{suffix}") == number * base ** ("kmg".index(suffix.lower()) + 1)
    assert rule.check(str(number)) == rule.check(number) == number


@pytest.mark.parametrize(("text", "number"), [("25.6k", 25600), ("1.5m", 1_500_000), ("0.5g", 500_000_000)])
def test_scaled_fractions(text: str, number: int) -> None:
    assert arg_utils.Integer(scaled=True).check(text) == number


@pytest.mark.parametrize("text", ["1.5", "1.5K", "1.0001k", "-1k", "k", "", "1 k", "0x10"])
def test_texts_that_are_no_integers(text: str) -> None:
    with pytest.raises(ValueError, match="must be an integer"):
        arg_utils.Integer(scaled=True).check(text)


@given(st.integers(), st.integers(-9, 9), st.integers(0, 9))
def test_integers_stay_in_range(number: int, minimum: int, width: int) -> None:
    rule = arg_utils.Integer(minimum=minimum, maximum=minimum + width)
    if minimum <= number <= minimum + width:
        assert rule.check(number) == number
    else:
        with pytest.raises(ValueError, match=f"from {minimum} to {minimum + width}"):
            rule.check(number)


# ----------------------------------------------------------------------------------------------------------------------
# Resolution: device and data type
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "requested", "device"),
    [
        (None, "auto", "cpu"),
        ("cuda", "auto", "cuda"),
        ("cuda", "cuda", "cuda"),
        ("cuda", "cpu", "cpu"),
        ("mps", "auto", "cpu"),
    ],
)
def test_device(accelerator: str | None, requested: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator))
    assert arg_utils.resolve_device(requested) == device


def test_cuda_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(TacoValidationError, match='device="cpu"'):
        create(device="cuda")


@pytest.mark.parametrize(
    ("checkpoint", "model_type", "behaviour", "dtype"),
    [
        ("float32", "llama", V0_6, "float16"),
        ("float32", "llama", V0_33, "bfloat16"),
        ("float16", "llama", V0_33, "float16"),
        ("bfloat16", "llama", V0_6, "bfloat16"),
        ("float32", "gemma3_text", V0_6, "bfloat16"),
        ("float16", "gemma2", V0_6, "bfloat16"),
    ],
)
def test_auto_dtype_on_a_gpu(checkpoint: str, model_type: str, behaviour: Any, dtype: str) -> None:
    assert arg_utils.resolve_dtype("auto", checkpoint, model_type, "cuda", behaviour) == dtype


@pytest.mark.parametrize("checkpoint", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype_on_a_cpu_is_said_in_one_line(
    checkpoint: str,
    has_bfloat16: bool,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(arg_utils, "cpu_has_bfloat16", lambda: has_bfloat16)
    with caplog.at_level(logging.INFO, logger="taco"):
        assert arg_utils.resolve_dtype("auto", checkpoint, "llama", "cpu", V0_6) == dtype
    assert len(caplog.messages) == 1 and dtype in caplog.messages[0] and checkpoint in caplog.messages[0]


@pytest.mark.parametrize(("device", "model_type"), [("cpu", "llama"), ("cuda", "gemma2")])
def test_float16_is_kept_with_a_warning_where_it_is_unwise(
    device: Any, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert arg_utils.resolve_dtype("float16", "float32", model_type, device, V0_6) == "float16"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("given", "dtype"), [("half", "float16"), ("float", "float32"), ("torch.bfloat16", "bfloat16")]
)
def test_names_of_dtypes(given: str, dtype: str) -> None:
    config = create(dtype=given)
    assert config.model_config.dtype == dtype
    assert config.cache_config.kv_cache_dtype == dtype


def test_torch_dtype_objects_are_accepted() -> None:
    import torch

    assert create(dtype=torch.bfloat16).model_config.dtype == "bfloat16"


def test_checkpoint_dtype_is_float32_where_the_config_states_none() -> None:
    assert arg_utils.checkpoint_dtype(FakeConfig(dtype=None)) == "float32"  # type: ignore[arg-type]
    assert arg_utils.checkpoint_dtype(FakeConfig(dtype="torch.float16")) == "float16"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "has_bfloat16"),
    [
        ("processor : 0\nflags\t\t: fpu avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("model name : has bf16 in its name\nflags : fpu\n", False),
    ],
)
def test_bfloat16_is_read_from_cpuinfo_where_torch_does_not_tell(
    text: str, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path, **options: text)
    assert arg_utils.cpu_has_bfloat16() == has_bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# Resolution: lengths and limits
# ----------------------------------------------------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, 4096),
        ({"max_position_embeddings": None, "n_positions": 1024}, 1024),
        ({"model_max_length": 512}, 512),
        ({"rope_parameters": LINEAR}, 16384),
        ({"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, 4096),
        ({"rope_parameters": YARN}, 16384),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 2048}}, 8192),
        ({"rope_parameters": LLAMA3}, 4096),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 1024}}, 4096),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {}}}, 4096),
        ({"model_type": "gemma3_text", "rope_parameters": LINEAR}, 4096),
        ({"sliding_window": 512}, 4096),
        ({"rope_parameters": None}, 4096),
    ],
)
def test_length_is_what_the_model_was_made_for(config: dict[str, Any], length: int, loader: FakeLoader) -> None:
    loader.config_values = config
    assert create().model_config.max_model_len == length
    assert create(max_model_len=length).model_config.max_model_len == length
    assert create(max_model_len=17).scheduler_config.max_model_len == 17
    with pytest.raises(TacoValidationError, match=f"max_model_len={length + 1}: the model has {length} positions"):
        create(max_model_len=length + 1)


@pytest.mark.parametrize("config", [{"sliding_window": 512}, {"sliding_window": 512, "use_sliding_window": True}])
def test_disabled_sliding_window_limits_the_length(config: dict[str, Any], loader: FakeLoader) -> None:
    loader.config_values = config
    assert create(disable_sliding_window=True).model_config.max_model_len == 512


@pytest.mark.parametrize("config", [{}, {"sliding_window": None}, {"sliding_window": 512, "use_sliding_window": False}])
def test_without_a_sliding_window_there_is_nothing_to_disable(config: dict[str, Any], loader: FakeLoader) -> None:
    loader.config_values = config
    assert create(disable_sliding_window=True).model_config.max_model_len == 4096


@pytest.mark.parametrize("value", ["auto", -1])
def test_automatic_length_may_be_lowered_later(value: Any) -> None:
    model_config = create(max_model_len=value).model_config
    assert (model_config.max_model_len, model_config.fit_max_model_len) == (4096, True)
    assert not create().model_config.fit_max_model_len


def test_length_must_be_given_where_the_config_does_not_say_it(loader: FakeLoader) -> None:
    loader.config_values = {"max_position_embeddings": None}
    with pytest.raises(TacoValidationError, match="max_model_len"):
        create()
    assert create(max_model_len=99).model_config.max_model_len == 99


@pytest.mark.parametrize(
    ("device", "values", "seqs", "tokens"),
    [
        ("cpu", {}, 256, 2048),
        ("cuda", {}, 256, 8192),
        ("cpu", {"max_num_seqs": 5000}, 5000, 5000),
        ("cpu", {"max_num_batched_tokens": 32}, 32, 32),
        ("cpu", {"max_num_batched_tokens": 32, "max_num_seqs": 64}, 32, 32),
        ("cpu", {"max_num_batched_tokens": 512, "max_num_seqs": 7}, 7, 512),
        ("cpu", {"enable_chunked_prefill": False}, 256, 4096),
        ("cuda", {"enable_chunked_prefill": False}, 256, 8192),
        ("cpu", {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096}, 256, 4096),
        ("cpu", {"enable_chunked_prefill": True, "max_num_batched_tokens": 100}, 100, 100),
    ],
)
def test_batch_limits(device: Any, values: dict[str, Any], seqs: int, tokens: int) -> None:
    assert arg_utils.resolve_batch_limits(EngineArgs(**values), 4096, device) == (seqs, tokens)


@pytest.mark.parametrize(("seqs", "num_warnings"), [(None, 0), (64, 1)])
def test_lowering_a_given_limit_is_said(seqs: int | None, num_warnings: int, caplog: pytest.LogCaptureFixture) -> None:
    create(max_num_seqs=seqs, max_num_batched_tokens=32)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == num_warnings


@pytest.mark.parametrize(
    ("variable", "argument", "expected"),
    [
        (None, None, None),
        ("2", None, 2 << 30),
        ("0.5", None, 1 << 29),
        ("2", "4K", 4096),
        (None, 100, 100),
        ("0", None, None),
        ("", None, None),
    ],
)
def test_kv_cache_on_a_cpu(
    variable: str | None, argument: Any, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", variable)
    assert create(kv_cache_memory_bytes=argument).cache_config.cpu_kv_cache_bytes == expected


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({}, "cpu", 0),
        ({"preemption_mode": "recompute"}, "cpu", 0),
        ({"preemption_mode": "swap"}, "cpu", 4 << 30),
        ({}, "cuda", 4 << 30),
        ({"swap_space": 0.5}, "cpu", 1 << 29),
        ({"swap_space": 0}, "cuda", 0),
        ({"swap_space": 2, "preemption_mode": "swap"}, "cpu", 2 << 30),
    ],
)
def test_swap_space_is_taken_where_swapping_is_of_use_or_asked_for(
    options: dict[str, Any], device: str, expected: int
) -> None:
    assert resolve_swap_space_bytes(EngineArgs("model", **options), device) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, GuidedDecodingConfig()),
        ({"guided_decoding_backend": "guidance"}, GuidedDecodingConfig(backend="llguidance")),
        ({"structured_outputs_config": {"backend": "outlines"}}, GuidedDecodingConfig(backend="outlines")),
        (
            {
                "guided_decoding_backend": "xgrammar",
                "structured_outputs_config": StructuredOutputsConfig(disable_additional_properties=True),
            },
            GuidedDecodingConfig(backend="xgrammar", disable_additional_properties=True),
        ),
        (
            {
                "guided_decoding_backend": "guidance",
                "structured_outputs_config": {"backend": "llguidance", "enable_in_reasoning": True},
            },
            GuidedDecodingConfig(backend="llguidance", enable_in_reasoning=True),
        ),
    ],
)
def test_guided_decoding_is_configured_by_either_argument(
    values: dict[str, Any], expected: GuidedDecodingConfig
) -> None:
    assert create(**values).guided_decoding_config == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"reasoning_config": {}}, None),
        ({"reasoning_parser": "mistral"}, ("mistral", "[THINK]", "[/THINK]")),
        ({"reasoning_config": {"reasoning_parser": "qwen3"}}, ("qwen3", "<think>", "</think>")),
        (
            {"reasoning_parser": "qwen3", "reasoning_config": {"reasoning_end_str": "x", "reasoning_start_str": None}},
            ("qwen3", "<think>", "x"),
        ),
    ],
)
def test_marks_of_reasoning(values: dict[str, Any], expected: tuple[str, ...] | None) -> None:
    config = create(**values).reasoning_config
    assert (None if config is None else dataclasses.astuple(config)) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reasoning_parser": "qwen9"}, "reasoning_parser='qwen9': taco supports 'deepseek_r1', .*'qwen3'"),
        ({"reasoning_config": {"reasoning_parser": "qwen9"}}, "taco knows deepseek_r1, "),
        ({"reasoning_config": {"reasoning_start_str": "a"}}, "give reasoning_start_str and reasoning_end_str"),
        ({"reasoning_config": {"reasoning_start_str": 1}}, "reasoning_start_str must be a text"),
        ({"reasoning_config": {"start": "a"}}, "'start' is not known; there are 'reasoning_parser'"),
        ({"reasoning_config": "qwen3"}, "must be a ReasoningConfig or a dict"),
    ],
)
def test_wrong_marks_of_reasoning_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TacoValidationError, match=message):
        create(**values)


def test_the_key_of_a_watermark_is_not_shown() -> None:
    args = EngineArgs("model", watermark_config={"key": 123456789})
    assert args.create_watermark_config() == WatermarkConfig(key=123456789)
    assert EngineArgs("model").create_watermark_config() is None
    assert "123456789" not in repr(args)
    for wrong in ({"key": 123456789, "alpha": 2}, {"key": -123456789}, ["123456789"]):
        with pytest.raises(TacoValidationError, match="^watermark_config: ") as caught:
            create(watermark_config=wrong)
        assert "123456789" not in str(caught.value)


def test_a_backend_of_vllm_that_taco_lacks_is_replaced_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="lm-format-enforcer.*does not have"):
        config = create(guided_decoding_backend="lm-format-enforcer")
    assert config.guided_decoding_config.backend == "auto"


@pytest.mark.parametrize(
    ("value", "error", "wording"),
    [
        ({"backend": "fast"}, UnsupportedFeatureError, "backend must be one of"),
        ({"disable_fallback": True}, TacoValidationError, "dict of its fields"),
        ({"disable_any_whitespace": 1}, TacoValidationError, "disable_any_whitespace must be True or False"),
        ({"reasoning_parser": 3}, TacoValidationError, "reasoning_parser must be a string"),
        ({"reasoning_parser_plugin": "x.py"}, UnsupportedFeatureError, "reasoning_parser_plugin must be empty"),
        ("guidance", TacoValidationError, "must be a StructuredOutputsConfig or a dict"),
    ],
)
def test_wrong_structured_outputs_config_is_named(value: Any, error: type[Exception], wording: str) -> None:
    with pytest.raises(error, match=f"structured_outputs_config=.*{wording}"):
        create(structured_outputs_config=value)


def test_backends_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(TacoValidationError, match="guided_decoding_backend='outlines' and structured_outputs_config"):
        create(guided_decoding_backend="outlines", structured_outputs_config={"backend": "xgrammar"})


@pytest.mark.parametrize("variable", ["4GB", "-1", "inf", "nan"])
def test_wrong_environment_variable_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", variable)
    with pytest.raises(TacoValidationError, match="VLLM_CPU_KVCACHE_SPACE"):
        create()


def test_remaining_defaults() -> None:
    config = create()
    assert config.cache_config.block_size == 16
    assert config.cache_config.swap_space_bytes == 0
    assert config.cache_config.enable_prefix_caching
    assert not config.scheduler_config.async_scheduling
    assert config.scheduler_config.enable_chunked_prefill
    assert config.model_config.tokenizer == config.model_config.served_model_name == "fake"
    assert config.parallel_config.world_size == 1


@pytest.mark.parametrize(
    ("device", "values", "expected"),
    [
        ("cuda", {}, True),
        ("cuda", {"disable_async_output_proc": True}, False),
        ("cuda", {"async_scheduling": False}, False),
        ("cuda", {"async_scheduling": True}, True),
        ("cuda", {"async_scheduling": False, "disable_async_output_proc": True}, False),
        ("cpu", {}, False),
        ("cpu", {"async_scheduling": True}, True),
    ],
)
def test_async_scheduling(device: str, values: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arg_utils, "resolve_device", lambda requested: device)
    config = create(**values)
    assert config.scheduler_config.async_scheduling is config.model_config.use_async_output_proc is expected


# ----------------------------------------------------------------------------------------------------------------------
# Resolution: the model
# ----------------------------------------------------------------------------------------------------------------------


def test_all_of_the_vocabulary_as_logprobs() -> None:
    assert create(max_logprobs=-1).model_config.max_logprobs == 1000


@pytest.mark.parametrize(("version", "mode"), [("0.6", "processed_logprobs"), ("0.33", "raw_logprobs")])
def test_logprobs_mode_follows_the_preset_unless_given(version: str, mode: str) -> None:
    assert create(compat_version=version).model_config.logprobs_mode == mode
    assert create(compat_version=version, logprobs_mode="raw_logits").model_config.logprobs_mode == "raw_logits"


def test_without_a_compat_version_the_default_of_the_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert create().behaviour is V0_6
    monkeypatch.setattr(compat, "_default_version", "0.33.0")
    assert create().behaviour is V0_33
    assert create(compat_version="0.6").behaviour is V0_6


FILE = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "eos_token_id": [1, 2], "do_sample": True, "min_p": None}


@pytest.mark.parametrize(
    ("version", "source", "expected"),
    [
        ("0.6", None, {}),
        ("0.6", "auto", {"temperature": 0.6, "top_k": 20}),
        ("0.6", "vllm", {}),
        ("0.33", None, {"temperature": 0.6, "top_k": 20, "max_tokens": 99}),
        ("0.33", "auto", {"temperature": 0.6, "top_k": 20, "max_tokens": 99}),
        ("0.33", "vllm", {}),
    ],
)
def test_default_sampling_params(
    version: str, source: str | None, expected: dict[str, Any], loader: FakeLoader
) -> None:
    loader.generation_config = FILE
    model_config = create(compat_version=version, generation_config=source).model_config
    assert model_config.get_diff_sampling_param() == expected
    assert model_config.try_get_generation_config() == FILE


def test_overrides_win_over_the_file_and_over_neutral_values(loader: FakeLoader) -> None:
    loader.generation_config = FILE
    overrides = {"top_k": 3, "max_new_tokens": 5}
    config = create(generation_config="auto", override_generation_config=overrides)
    assert config.model_config.get_diff_sampling_param() == {"temperature": 0.6, "top_k": 3, "max_tokens": 5}
    config = create(generation_config="vllm", override_generation_config=overrides)
    assert config.model_config.get_diff_sampling_param() == {"top_k": 3, "max_tokens": 5}


@pytest.mark.parametrize(("version", "top_k"), [("0.6", {}), ("0.33", {"top_k": 50})])
def test_values_that_transformers_has_anyway_count_in_033_alone(
    version: str, top_k: dict[str, int], loader: FakeLoader
) -> None:
    loader.generation_config = {"top_k": 50, "temperature": 0.6}
    model_config = create(compat_version=version, generation_config="auto").model_config
    assert model_config.get_diff_sampling_param() == {"temperature": 0.6, **top_k}


def test_end_of_sequence_of_the_config_counts_without_a_generation_config(loader: FakeLoader) -> None:
    loader.config_values = {"eos_token_id": 9}
    assert create().model_config.try_get_generation_config() == {"eos_token_id": 9}


def test_end_of_sequence_can_be_overridden(loader: FakeLoader) -> None:
    loader.generation_config = FILE
    config = create(override_generation_config={"eos_token_id": 7}).model_config
    assert config.try_get_generation_config()["eos_token_id"] == 7
    assert config.get_diff_sampling_param() == {}


@pytest.mark.parametrize("overrides", [{"top_kk": 3}, {"do_sample": True}, {"eos_token_id": "</s>"}])
def test_overrides_without_an_effect_are_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(TacoValidationError, match=f"override_generation_config.*{next(iter(overrides))}"):
        create(override_generation_config=overrides)


def test_generation_config_of_another_place(tmp_path: Path, loader: FakeLoader) -> None:
    loader.generation_config = FILE
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.7}', encoding="utf-8")
    model_config = create(generation_config=str(tmp_path)).model_config
    assert model_config.get_diff_sampling_param() == {"top_p": 0.7}
    assert model_config.try_get_generation_config()["eos_token_id"] == [1, 2]


@pytest.mark.parametrize(
    ("content", "wording"), [(None, "generation_config="), ("[1]", "JSON object"), ("{", "not valid JSON")]
)
def test_generation_config_that_cannot_be_read(content: str | None, wording: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(TacoValidationError, match=wording):
        create(generation_config=str(tmp_path))


def test_chat_template_is_a_text_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0] }} é", encoding="utf-8")
    assert create(chat_template=str(file)).model_config.chat_template == "{{ messages[0] }} é"
    assert create(chat_template=file).model_config.chat_template == "{{ messages[0] }} é"
    assert create(chat_template="{{ x }}").model_config.chat_template == "{{ x }}"
    with pytest.raises(TacoValidationError, match="chat_template='/no/such/file'"):
        create(chat_template="/no/such/file")


def test_tokenizer_revision_is_that_of_the_model_unless_given() -> None:
    assert create(revision="v1").model_config.tokenizer_revision == "v1"
    assert create(revision="v1", tokenizer_revision="v2").model_config.tokenizer_revision == "v2"


def test_a_folder_has_no_revisions_of_its_tokenizer(tmp_path: Path) -> None:
    for local in ({"tokenizer": str(tmp_path)}, {"model": str(tmp_path)}):
        with pytest.raises(TacoValidationError, match="tokenizer_revision='v2': .* local folder .* no revisions"):
            create(**local, revision="v1", tokenizer_revision="v2")
        assert create(**local, revision="v1").model_config.revision == "v1"
    create(model=str(tmp_path), tokenizer="org/tokenizer", tokenizer_revision="v2")


def test_first_served_name_counts() -> None:
    assert create(served_model_name=["a", "b"]).model_config.served_model_name == "a"
    assert create(served_model_name="a").model_config.served_model_name == "a"


def test_loader_gets_what_it_needs(loader: FakeLoader) -> None:
    create(
        model=Path("/some/folder"),
        revision="r",
        code_revision="c",
        trust_remote_code=True,
        download_dir="/d",
        ignore_patterns="*.bin",
        load_format="pt",
        hf_overrides=dict,
    )
    expected = {
        "revision": "r",
        "download_dir": "/d",
        "hf_token": None,
        "load_format": "pt",
        "ignore_patterns": ["*.bin"],
    }
    assert loader.calls[0] == ("/some/folder", expected)
    assert loader.calls[1] == {"trust_remote_code": True, "revision": "c", "hf_overrides": dict}


def test_gguf_file_is_recognised(loader: FakeLoader) -> None:
    loader.kind = "gguf"
    loader.config_values = {"quantization_config": {"quant_method": "gguf"}}
    assert create().model_config.quantization == create(quantization="gguf").model_config.quantization == "gguf"


@pytest.mark.parametrize("details", [{"quant_method": "gptq"}, types.SimpleNamespace(quant_method="gptq")])
def test_quantised_checkpoint_is_refused(details: Any, loader: FakeLoader) -> None:
    loader.config_values = {"quantization_config": details}
    with pytest.raises(UnsupportedFeatureError, match="gptq"):
        create()


def test_rope_arguments_win_over_overrides_of_the_config(loader: FakeLoader) -> None:
    create(rope_theta=7.0, rope_scaling=YARN, hf_overrides={"rope_theta": 8.0, "vocab_size": 9})
    assert loader.calls[1]["hf_overrides"] == {"rope_theta": 7.0, "rope_scaling": YARN, "vocab_size": 9}
    with pytest.raises(TacoValidationError, match="callable hf_overrides"):
        create(rope_theta=7.0, hf_overrides=lambda config: config)


def test_rope_arguments_need_rotary_embeddings(loader: FakeLoader) -> None:
    loader.config_values = {"model_type": "gpt2", "rope_parameters": None}
    with pytest.raises(TacoValidationError, match="'gpt2' has no rotary embeddings"):
        create(rope_theta=7.0)


@pytest.mark.parametrize(
    ("class_name", "values", "length"),
    [
        ("LlamaConfig", {"max_position_embeddings": 2048}, 2048),
        ("LlamaConfig", {"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2.0}}, 4096),
        ("Qwen2Config", {"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        ("Gemma3TextConfig", {"max_position_embeddings": 32768}, 32768),
        ("GPT2Config", {"n_positions": 512}, 512),
        ("OPTConfig", {"max_position_embeddings": 2048}, 2048),
    ],
)
def test_length_of_real_configs(class_name: str, values: dict[str, Any], length: int) -> None:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, class_name)(**values)
    assert arg_utils.resolve_max_model_len(config.get_text_config(), EngineArgs()) == length
    assert arg_utils.checkpoint_dtype(config) == "float32"


@pytest.mark.parametrize(
    ("fields", "values", "length"),
    [
        ({}, {}, 2048),
        ({}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 7.0}, 4096),
        ({"rope_theta": 7.0}, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 8192),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"hf_overrides": {"rope_scaling": None}},
            2048,
        ),
    ],
)
def test_rope_arguments_reach_the_config_of_a_real_folder(
    fields: dict[str, Any], values: dict[str, Any], length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    config = {"model_type": "llama", "vocab_size": 50, "max_position_embeddings": 2048, "dtype": "bfloat16", **fields}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model_config = create(model=tmp_path, load_format="dummy", **values).model_config
    assert model_config.max_model_len == length
    if fields or values:
        assert model_config.hf_config.rope_parameters["rope_theta"] == 7.0
    assert model_config.vocab_size == 50


def test_parts_of_the_config_under_their_own_names() -> None:
    args = EngineArgs("fake", device="cpu", dtype="float32", load_format="dummy", download_dir="/d")
    config = args.create_config()
    assert args.create_engine_config() == config
    assert args.create_model_config() == config.model_config
    assert args.create_load_config() == config.load_config
    assert (config.load_config.load_format, config.load_config.download_dir) == ("dummy", "/d")
    with pytest.raises(UnsupportedFeatureError, match="headless"):
        args.create_engine_config(headless=True)


def test_how_weights_are_loaded_is_known_without_the_model() -> None:
    assert EngineArgs("/nowhere", load_format="gguf").create_load_config().load_format == "gguf"
    with pytest.raises(TacoValidationError, match="load_format"):
        EngineArgs("/nowhere", load_format="magic").create_load_config()


def test_flags_of_the_asynchronous_engine_alone_are_none() -> None:
    parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser(), async_args_only=True)
    assert vars(parser.parse_args([])) == {}
    assert "max_num_seqs" in vars(AsyncEngineArgs.add_cli_args(argparse.ArgumentParser()).parse_args([]))


def test_parts_that_there_are_none_of_are_none_once_the_arguments_are_checked(loader: FakeLoader) -> None:
    parts: dict[str, tuple[object, ...]] = {
        "create_diffusion_config": (),
        "create_logging_config": (),
        "create_observability_config": (),
        "create_speculative_config": (None, None),
        "validate_tensorizer_args": (),
    }
    for name, arguments in parts.items():
        assert getattr(EngineArgs("model"), name)(*arguments) is None
        with pytest.raises(UnsupportedFeatureError, match="speculative_model"):
            getattr(EngineArgs("model", speculative_model="draft"), name)(*arguments)
    assert EngineArgs("model").create_structured_outputs_config() == StructuredOutputsConfig()
    given = StructuredOutputsConfig("guidance", disable_any_whitespace=True)
    assert EngineArgs("model", structured_outputs_config=given).create_structured_outputs_config() == given
    assert loader.calls == []


def test_batch_defaults_are_those_of_the_machine(loader: FakeLoader) -> None:
    tokens, seqs = EngineArgs.get_batch_defaults(world_size=8)
    config = EngineArgs("model").create_config().scheduler_config
    assert set(tokens) == set(seqs) == set(UsageContext)
    assert set(tokens.values()) == {config.max_num_batched_tokens} and set(seqs.values()) == {config.max_num_seqs}


def test_a_launcher_may_have_started_one_process(loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (None, "uni", "mp", "external_launcher"):
        for variable in ("", "1"):
            monkeypatch.setenv("WORLD_SIZE", variable)
            assert create(distributed_executor_backend=backend) == create()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert create(distributed_executor_backend="mp") == create()
    with pytest.raises(UnsupportedFeatureError, match="distributed_executor_backend=.*started 2 processes"):
        create(distributed_executor_backend="external_launcher")
    for other in ("ray", object()):
        with pytest.raises(UnsupportedFeatureError, match="distributed_executor_backend=.*another executor"):
            create(distributed_executor_backend=other)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(TacoValidationError, match="WORLD_SIZE is 'many'"):
        create(distributed_executor_backend="external_launcher")
