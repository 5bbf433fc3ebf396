"""What the arguments of an engine come to, given each other, the machine and the model."""

from __future__ import annotations

import dataclasses
import json
import logging
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from taco import compat
from taco.compat import V0_6, V0_33
from taco.config import GuidedDecodingConfig
from taco.engine import arg_resolution, arg_utils
from taco.engine.arg_utils import EngineArgs
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.guided.request import StructuredOutputsConfig
from taco.watermark import WatermarkConfig
from tests.engine.fake_source import FakeConfig, FakeSource, create, install


@pytest.fixture(autouse=True)
def loader(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    return install(monkeypatch)


# ----------------------------------------------------------------------------------------------------------------------
# Device and data type
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
    assert arg_resolution.resolve_device(requested) == device


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
    assert arg_resolution.resolve_dtype("auto", checkpoint, model_type, "cuda", behaviour) == dtype


@pytest.mark.parametrize("checkpoint", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype_on_a_cpu_is_said_in_one_line(
    checkpoint: str,
    has_bfloat16: bool,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(arg_resolution, "cpu_has_bfloat16", lambda: has_bfloat16)
    with caplog.at_level(logging.INFO, logger="taco"):
        assert arg_resolution.resolve_dtype("auto", checkpoint, "llama", "cpu", V0_6) == dtype
    assert len(caplog.messages) == 1 and dtype in caplog.messages[0] and checkpoint in caplog.messages[0]


@pytest.mark.parametrize(("device", "model_type"), [("cpu", "llama"), ("cuda", "gemma2")])
def test_float16_is_kept_with_a_warning_where_it_is_unwise(
    device: Any, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert arg_resolution.resolve_dtype("float16", "float32", model_type, device, V0_6) == "float16"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("given", "dtype"), [("half", "float16"), ("float", "float32"), ("torch.bfloat16", "bfloat16")]
)
def test_names_of_dtypes(given: str, dtype: str) -> None:
    config = create(dtype=given)
    assert config.model_config.dtype_name == dtype
    assert config.cache_config.kv_cache_dtype == dtype


def test_no_seed_is_the_default() -> None:
    assert create(seed=None).model_config.seed == create().model_config.seed == 0


def test_torch_dtype_objects_are_accepted() -> None:
    import torch

    assert create(dtype=torch.bfloat16).model_config.dtype is torch.bfloat16


def test_checkpoint_dtype_is_float32_where_the_config_states_none() -> None:
    assert arg_resolution.checkpoint_dtype(FakeConfig(dtype=None)) == "float32"  # type: ignore[arg-type]
    assert arg_resolution.checkpoint_dtype(FakeConfig(dtype="torch.float16")) == "float16"  # type: ignore[arg-type]


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
    assert arg_resolution.cpu_has_bfloat16() == has_bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# lengths and limits
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
def test_length_is_what_the_model_was_made_for(config: dict[str, Any], length: int, loader: FakeSource) -> None:
    loader.config_values = config
    assert create().model_config.max_model_len == length
    assert create(max_model_len=length).model_config.max_model_len == length
    assert create(max_model_len=17).scheduler_config.max_model_len == 17
    with pytest.raises(TacoValidationError, match=f"max_model_len={length + 1}: the model has {length} positions"):
        create(max_model_len=length + 1)


@pytest.mark.parametrize("config", [{"sliding_window": 512}, {"sliding_window": 512, "use_sliding_window": True}])
def test_disabled_sliding_window_limits_the_length(config: dict[str, Any], loader: FakeSource) -> None:
    loader.config_values = config
    assert create(disable_sliding_window=True).model_config.max_model_len == 512


@pytest.mark.parametrize("config", [{}, {"sliding_window": None}, {"sliding_window": 512, "use_sliding_window": False}])
def test_without_a_sliding_window_there_is_nothing_to_disable(config: dict[str, Any], loader: FakeSource) -> None:
    loader.config_values = config
    assert create(disable_sliding_window=True).model_config.max_model_len == 4096


@pytest.mark.parametrize("value", ["auto", -1])
def test_automatic_length_may_be_lowered_later(value: Any) -> None:
    model_config = create(max_model_len=value).model_config
    assert (model_config.max_model_len, model_config.fit_max_model_len) == (4096, True)
    assert not create().model_config.fit_max_model_len


def test_length_must_be_given_where_the_config_does_not_say_it(loader: FakeSource) -> None:
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
    assert arg_resolution.resolve_batch_limits(EngineArgs(**values), 4096, device) == (seqs, tokens)


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
    assert arg_resolution.resolve_swap_space_bytes(EngineArgs("model", **options), device) == expected


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
# the model
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
    version: str, source: str | None, expected: dict[str, Any], loader: FakeSource
) -> None:
    loader.generation_config = FILE
    model_config = create(compat_version=version, generation_config=source).model_config
    assert model_config.get_diff_sampling_param() == expected
    assert model_config.try_get_generation_config() == FILE


def test_overrides_win_over_the_file_and_over_neutral_values(loader: FakeSource) -> None:
    loader.generation_config = FILE
    overrides = {"top_k": 3, "max_new_tokens": 5}
    config = create(generation_config="auto", override_generation_config=overrides)
    assert config.model_config.get_diff_sampling_param() == {"temperature": 0.6, "top_k": 3, "max_tokens": 5}
    config = create(generation_config="vllm", override_generation_config=overrides)
    assert config.model_config.get_diff_sampling_param() == {"top_k": 3, "max_tokens": 5}


@pytest.mark.parametrize(("version", "top_k"), [("0.6", {}), ("0.33", {"top_k": 50})])
def test_values_that_transformers_has_anyway_count_in_033_alone(
    version: str, top_k: dict[str, int], loader: FakeSource
) -> None:
    loader.generation_config = {"top_k": 50, "temperature": 0.6}
    model_config = create(compat_version=version, generation_config="auto").model_config
    assert model_config.get_diff_sampling_param() == {"temperature": 0.6, **top_k}


def test_end_of_sequence_of_the_config_counts_without_a_generation_config(loader: FakeSource) -> None:
    loader.config_values = {"eos_token_id": 9}
    assert create().model_config.try_get_generation_config() == {"eos_token_id": 9}


def test_end_of_sequence_can_be_overridden(loader: FakeSource) -> None:
    loader.generation_config = FILE
    config = create(override_generation_config={"eos_token_id": 7}).model_config
    assert config.try_get_generation_config()["eos_token_id"] == 7
    assert config.get_diff_sampling_param() == {}


@pytest.mark.parametrize("overrides", [{"top_kk": 3}, {"do_sample": True}, {"eos_token_id": "</s>"}])
def test_overrides_without_an_effect_are_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(TacoValidationError, match=f"override_generation_config.*{next(iter(overrides))}"):
        create(override_generation_config=overrides)


def test_generation_config_of_another_place(tmp_path: Path, loader: FakeSource) -> None:
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


def test_loader_gets_what_it_needs(loader: FakeSource) -> None:
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


def test_gguf_file_is_recognised(loader: FakeSource) -> None:
    loader.kind = "gguf"
    loader.config_values = {"quantization_config": {"quant_method": "gguf"}}
    assert create().model_config.quantization == create(quantization="gguf").model_config.quantization == "gguf"


@pytest.mark.parametrize("details", [{"quant_method": "gptq"}, types.SimpleNamespace(quant_method="gptq")])
def test_quantised_checkpoint_is_refused(details: Any, loader: FakeSource) -> None:
    loader.config_values = {"quantization_config": details}
    with pytest.raises(UnsupportedFeatureError, match="gptq"):
        create()


def test_rope_arguments_win_over_overrides_of_the_config(loader: FakeSource) -> None:
    create(rope_theta=7.0, rope_scaling=YARN, hf_overrides={"rope_theta": 8.0, "vocab_size": 9})
    assert loader.calls[1]["hf_overrides"] == {"rope_theta": 7.0, "rope_scaling": YARN, "vocab_size": 9}
    with pytest.raises(TacoValidationError, match="callable hf_overrides"):
        create(rope_theta=7.0, hf_overrides=lambda config: config)


def test_rope_arguments_need_rotary_embeddings(loader: FakeSource) -> None:
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
    assert arg_resolution.resolve_max_model_len(config.get_text_config(), EngineArgs()) == length
    assert arg_resolution.checkpoint_dtype(config) == "float32"


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
