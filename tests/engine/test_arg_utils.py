"""EngineArgs: the names of both vLLM versions, and what becomes of each."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from taco.config import ProfilerConfig, ReasoningConfig
from taco.engine.arg_fields import Immaterial, Implemented, NotBuilt, treatment_of
from taco.engine.arg_utils import AsyncEngineArgs, EngineArgs
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.guided.request import StructuredOutputsConfig
from taco.pooling_params import PoolerConfig
from taco.usage_context import UsageContext
from taco.watermark import WatermarkConfig
from tests.engine.fake_source import FakeSource, create, install


@pytest.fixture(autouse=True)
def loader(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    return install(monkeypatch)


REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "engine_args_fields.json").read_text(encoding="utf-8"))
FIELDS = {field.name: field for field in dataclasses.fields(AsyncEngineArgs)}
IMPLEMENTED = {name: field for name, field in FIELDS.items() if isinstance(treatment_of(field), Implemented)}
IMMATERIAL = {name: field for name, field in FIELDS.items() if isinstance(treatment_of(field), Immaterial)}
NOT_BUILT = {name: field for name, field in FIELDS.items() if isinstance(treatment_of(field), NotBuilt)}


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
def test_what_is_not_built_raises_by_name_before_a_model_is_looked_for(name: str, loader: FakeSource) -> None:
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
def test_no_implemented_field_is_ignored(name: str, loader: FakeSource) -> None:
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
        ("seed", 1.5, "must be an integer"),
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


def test_wrong_arguments_about_the_model_are_listed_at_once(loader: FakeSource) -> None:
    loader.config_values = {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(TacoValidationError) as caught:
        create(max_model_len=5000)
    assert "awq" in str(caught.value) and "max_model_len=5000" in str(caught.value)


def test_an_unknown_architecture_comes_before_what_depends_on_it(loader: FakeSource) -> None:
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


def test_token_is_not_shown(loader: FakeSource) -> None:
    args = EngineArgs(model="fake", device="cpu", hf_token="very-secret")
    config = args.create_config()
    assert "very-secret" not in repr(args) + repr(config)
    assert config.model_config.hf_token == "very-secret"
    assert loader.calls[0][1]["hf_token"] == "very-secret"


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


def test_parts_that_there_are_none_of_are_none_once_the_arguments_are_checked(loader: FakeSource) -> None:
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


def test_batch_defaults_are_those_of_the_machine(loader: FakeSource) -> None:
    tokens, seqs = EngineArgs.get_batch_defaults(world_size=8)
    config = EngineArgs("model").create_config().scheduler_config
    assert set(tokens) == set(seqs) == set(UsageContext)
    assert set(tokens.values()) == {config.max_num_batched_tokens} and set(seqs.values()) == {config.max_num_seqs}


def test_a_launcher_may_have_started_one_process(loader: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
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
