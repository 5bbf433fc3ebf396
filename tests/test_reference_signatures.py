"""Names, signatures and defaults against those of both vLLM versions, class by class and method by method.

`tests/data/vllm_api_params.json` has, for each version, what `vllm` exports and every class of its offline API: its
module; the parameters of its constructor and methods with the source text of their defaults (null: required; "*", "/"
and "**" as in a signature); its properties, members or keys. The fields of `EngineArgs` are compared in
`tests/engine/test_arg_utils.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

import taco
from taco import inputs, outputs, sampling_params, vllm_alias
from taco.usage_context import UsageContext

API: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "vllm_api_params.json").read_text())
OLD, NEW = API

# What taco does not have. Whatever comes into being must leave these lists.
ABSENT_CLASSES = """
    AdapterLogitsProcessor BeamSearchOfflineMixin GuidedDecodingRequest LLMGuidedOptions
    OfflineInferenceMixin PromptAdapterRequest RequestError SequenceStatus StructuredOutputsConfig V1LogitsProcessor
""".split()
ABSENT_MEMBERS = {
    "LLM": "deprecate_legacy_api",
    "EngineArgs": """
        create_diffusion_config create_logging_config create_observability_config create_speculative_config
        create_structured_outputs_config create_watermark_config get_batch_defaults validate_tensorizer_args""",
    "LLMEngine": """
        add_prompt_adapter create_trace_span do_tracing enable_output_validation get_decoding_config
        get_tokenizer_group list_prompt_adapters remove_logger remove_prompt_adapter
        stop_remote_worker_execution_loop validate_output validate_outputs""",
    "AsyncLLMEngine": """
        set_errored get_input_preprocessor engine_step process_request_outputs run_engine_loop get_decoding_config
        add_logger remove_logger get_num_queued_tokens check_admission notify_kv_transfer_request_rejected
        checkpoint_prepare checkpoint_restore compute_weight_checksums add_lora remove_lora list_loras pin_lora
        scale_elastic_ep get_external_elastic_ep_status handle_fault get_status
        init_weight_transfer_engine shutdown_weight_transfer_engine start_draft_weight_update get_kv_event_sources""",
    "SamplingParams": "for_sampler_warmup",
    "GuidedDecodingParams": "from_optional",
    "StructuredOutputsParams": "all_constraints_none all_non_structural_tag_constraints_none",
    "BeamSearchParams": "configure_logprobs",
    "PoolerConfig": "reject_removed_parameters",
    "LateInteractionParams": "verify",
    "LateChunkingParams": "verify",
    "RequestOutput": "from_seq_group",
    "PoolingRequestOutput": "from_seq_group",
    "_ModelRegistry": """
        inspect_model_cls is_attention_free_model is_cross_encoder_model is_hc_sp_supported_model
        is_hybrid_model is_multimodal_raw_input_only_model is_noops_model is_pp_supported_model
        is_transcription_model is_transcription_only_model model_has_inner_state resolve_model_cls""",
}
ABSENT_PARAMETERS = {
    # Made by `from_engine_args`; taco's takes a config alone.
    "LLMEngine.__init__": "vllm_config executor_class log_stats usage_context stat_loggers input_registry mm_registry "
    "use_cached_outputs aggregate_engine_logging multiprocess_mode",
    "AsyncLLMEngine.__init__": "executor_class log_stats usage_context mm_registry stat_loggers "
    "aggregate_engine_logging client_addresses client_count client_index profiler",
    "AsyncLLMEngine.from_vllm_config": "client_addresses client_count client_index",
    "_ModelRegistry.__init__": "models",
}
# Where the versions' defaults differ, taco has 0.6's. A parameter that only one version has is optional.
OTHER_DEFAULTS: dict[str, dict[str, object]] = {
    "LLM.__init__": {"gpu_memory_utilization": 0.9, "enforce_eager": None},
    "LLM.generate": {"prompts": None},
    "LLM.encode": {"prompts": None},
    "LLMEngine.add_request": {"prompt": None, "params": None},
    "LLMEngine.abort_request": {"request_id": None, "request_ids": None},  # the versions' names of one parameter
    "AsyncLLMEngine.add_request": {"prompt": None, "params": None},
    "PoolingOfflineMixin.encode": {"prompts": None},
    "SamplingParams.__init__": {"top_k": -1},
    "SamplingParams.from_optional": {"top_k": -1},
    "BeamSearchInstance.__init__": {"prompt_tokens": None, "prompt": None},  # one of them is required
    "_ModelRegistry.is_text_generation_model": {"model_config": None},
    "_ModelRegistry.is_pooling_model": {"model_config": None},
    "_ModelRegistry.is_multimodal_model": {"model_config": None},
    "BeamSearchSequence.__init__": {"orig_prompt": None},
    "PoolingRequestOutput.__init__": {"num_cached_tokens": 0},
}
# The versions' orders contradict each other.
KEYWORDS_ONLY = ["PoolingParams.__init__", "SamplingParams.from_optional"]
# Structs of vLLM whose fields programs enumerate.
WITH_STRUCT_FIELDS = ["SamplingParams", "BeamSearchParams", "PoolingParams"]
# Properties of vLLM that are attributes here.
SET_BY_CONSTRUCTOR = {"LLMEngine": ["tokenizer"]}
ABSENT_PROPERTIES = {"AsyncLLMEngine": ["should_keep_api_server_alive"]}  # there is no server

CLASSES = [(version, name) for version in API for name in API[version]["classes"]]
PRESENT = [(version, name) for version, name in CLASSES if name not in ABSENT_CLASSES]


def facts(version: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = API[version]["classes"].get(name, {})
    return found


def callables_of(version: str, name: str) -> dict[str, dict[str, str | None]]:
    """Their parameters of the constructor and of the methods that taco has."""
    entry = facts(version, name)
    found = {"__init__": entry["parameters"]} if "parameters" in entry else {}
    absent = ABSENT_MEMBERS.get(name, "").split()
    return found | {method: entry["methods"][method] for method in entry.get("methods", {}) if method not in absent}


SIGNATURES = [(version, name, method) for version, name in PRESENT for method in callables_of(version, name)]


@pytest.fixture(scope="module", autouse=True)
def alias() -> Iterator[None]:
    vllm_alias.install()
    yield
    vllm_alias.uninstall()


def ours(version: str, name: str) -> Any:
    """The class where programs look for it."""
    entry = facts(version, name)
    return getattr(import_module(entry["module"]), entry.get("name", name))


def our_parameters(cls: type, method: str) -> dict[str, inspect.Parameter]:
    """By name, without `self`."""
    if method == "__init__":
        return dict(inspect.signature(cls).parameters)
    parameters = dict(inspect.signature(getattr(cls, method)).parameters)
    if not isinstance(inspect.getattr_static(cls, method), staticmethod | classmethod):
        parameters.pop(next(iter(parameters)))
    return parameters


def default_of(cls: type, method: str, name: str) -> object:
    """The default of a parameter, or of a field that the constructor does not take."""
    for field in dataclasses.fields(cls) if method == "__init__" and dataclasses.is_dataclass(cls) else ():
        if field.name == name and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        if field.name == name and not field.init:
            return field.default
    return our_parameters(cls, method)[name].default


def positional(parameters: dict[str, str | None]) -> list[str]:
    return [name for name in takewhile(lambda name: name not in ("*", "**"), parameters) if name != "/"]


def named(parameters: dict[str, str | None]) -> dict[str, str | None]:
    """Those that can be given by name, which leaves out the ones before "/"."""
    names = [name for name in parameters if name not in ("*", "**")]
    return {name: parameters[name] for name in names[names.index("/") + 1 if "/" in names else 0 :]}


@pytest.mark.parametrize(("version", "name", "method"), SIGNATURES)
def test_parameters_have_the_names_and_defaults_of_both_versions(version: str, name: str, method: str) -> None:
    cls = ours(version, name)
    key = f"{name}.{method}"
    names = vars(sampling_params) | {"UsageContext": UsageContext}
    for parameter, text in named(callables_of(version, name)[method]).items():
        if parameter in ABSENT_PARAMETERS.get(key, "").split():
            continue
        expected = inspect.Parameter.empty if text is None else eval(text, names)
        expected = OTHER_DEFAULTS.get(key, {}).get(parameter, expected)
        default = default_of(cls, method, parameter)
        assert default == expected and type(default) is type(expected), f"{key}({parameter})"


@pytest.mark.parametrize(("version", "name", "method"), SIGNATURES)
def test_positional_order_is_that_of_0_6_where_it_has_one(version: str, name: str, method: str) -> None:
    key = f"{name}.{method}"
    if key in KEYWORDS_ONLY or (version == NEW and method in callables_of(OLD, name)):
        return
    absent = ABSENT_PARAMETERS.get(key, "").split()
    cls = ours(version, name)
    not_taken = [f.name for f in dataclasses.fields(cls) if not f.init] if dataclasses.is_dataclass(cls) else []
    order = [p for p in positional(callables_of(version, name)[method]) if p not in [*absent, *not_taken]]
    taken = [p for p in our_parameters(cls, method).values() if p.kind is not p.KEYWORD_ONLY]
    # What cannot be given by name may have another one.
    by_name = named(callables_of(version, name)[method])
    found = [p.name if p.kind is not p.POSITIONAL_ONLY else "/" for p in taken[: len(order)]]
    assert len(found) == len(order)
    for our_name, their_name in zip(found, order, strict=True):
        assert our_name == their_name or their_name not in by_name


@pytest.mark.parametrize(("version", "name"), PRESENT)
def test_properties_members_and_keys_are_there(version: str, name: str) -> None:
    cls, entry = ours(version, name), facts(version, name)
    for name_of_property in entry.get("properties", []):
        there = hasattr(cls, name_of_property) or name_of_property in SET_BY_CONSTRUCTOR.get(name, [])
        assert there != (name_of_property in ABSENT_PROPERTIES.get(name, []))
    if "members" in entry:
        assert issubclass(cls, Enum)
        assert {member.name: repr(member.value) for member in cls} == entry["members"]
    for key in entry.get("keys", []):
        assert key in cls.__annotations__
        assert key in inputs._KNOWN_KEYS or name == "ConversationMessage"
    if name in WITH_STRUCT_FIELDS:
        assert entry["is_struct"]
        assert set(entry["parameters"]) <= set(cls.__struct_fields__)
        assert set(entry["parameters"]) <= set(cls.__annotations__)


def test_metrics_answer_to_both_naming_schemes() -> None:
    metrics = outputs.RequestMetrics(10.0, 14.0, 11.0, 12.0, 1.0)
    for name in (*facts(OLD, "RequestMetrics")["parameters"], *facts(NEW, "RequestStateStats")["parameters"]):
        assert hasattr(metrics, name)


# The lists


def test_absent_classes_are_errors_and_nowhere_defined() -> None:
    defined = {
        node.name
        for path in Path(taco.__file__).parent.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    known = {name for _, name in CLASSES}
    for name in ABSENT_CLASSES:
        assert name in known
        assert name not in defined, f"{name} exists: name it in taco/vllm_alias.py and take it out of ABSENT_CLASSES"
        for version in API:
            if facts(version, name):
                with pytest.raises((ImportError, AttributeError), match="taco"):
                    ours(version, name)


def test_absent_members_and_parameters_are_absent() -> None:
    for version, name in PRESENT:
        cls = ours(version, name)
        there = [member for member in ABSENT_MEMBERS.get(name, "").split() if hasattr(cls, member)]
        assert not there, f"take {name}: {there} out of ABSENT_MEMBERS"
    for key, names in ABSENT_PARAMETERS.items():
        name, _, method = key.partition(".")
        taken = our_parameters(ours(NEW if facts(NEW, name) else OLD, name), method)
        assert not set(names.split()) & set(taken), f"take parameters of {key} out of ABSENT_PARAMETERS"


def test_the_lists_name_what_the_versions_have() -> None:
    for name, members in ABSENT_MEMBERS.items():
        known = {member for version in API for member in facts(version, name).get("methods", ())}
        assert set(members.split()) <= known
    for key in [*ABSENT_PARAMETERS, *OTHER_DEFAULTS]:
        name, _, method = key.partition(".")
        known = {p for version in API for p in callables_of(version, name).get(method, ())}
        assert {*ABSENT_PARAMETERS.get(key, "").split(), *OTHER_DEFAULTS.get(key, ())} <= known
