"""What a model is used for, and how it pools."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from taco.compat import V0_33
from taco.engine.arg_utils import EngineArgs, for_encoder, resolve_dtype, resolve_max_model_len
from taco.engine.pooling_config import resolve_pooler, resolve_task
from taco.errors import TacoValidationError
from taco.models.loader.sentence_transformers import SentenceTransformersFiles
from taco.models.registry import find_architecture
from taco.pooling_params import PoolerConfig

FILES = SentenceTransformersFiles(seq_pooling_type="MEAN", normalize=True)


def config(architecture: str, **values: Any) -> Any:
    defaults = {"architectures": [architecture], "model_type": "x", "hidden_size": 8, "num_labels": 2}
    return SimpleNamespace(**defaults | values)


def task_of(hf_config: Any, files: SentenceTransformersFiles | None = None, **args: Any) -> str:
    architecture = find_architecture(hf_config)
    assert architecture is not None
    return resolve_task(EngineArgs(**args), hf_config, architecture, files)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "generate"),
        ("GPT2LMHeadModel", "generate"),
        ("LlamaModel", "embed"),
        ("GPT2Model", "embed"),
        ("Gemma3TextModel", "embed"),
        ("BertModel", "embed"),
        ("XLMRobertaForMaskedLM", "embed"),
        ("Qwen3ForSequenceClassification", "classify"),
        ("GPT2ForSequenceClassification", "classify"),
        ("ModernBertForTokenClassification", "classify"),
        ("Qwen2ForRewardModel", "reward"),
        ("Qwen2ForProcessRewardModel", "reward"),
    ],
)
def test_the_architecture_decides_unless_told_otherwise(architecture: str, expected: str) -> None:
    assert task_of(config(architecture)) == expected


def test_unknown_architectures_are_left_to_the_loader() -> None:
    assert find_architecture(config("BloomForCausalLM")) is None
    assert find_architecture(config("BloomModel")) is None


def test_pooling_settings_beside_a_language_model_make_it_an_embedding_model() -> None:
    assert task_of(config("Qwen3ForCausalLM"), FILES) == "embed"
    assert task_of(config("Qwen3ForCausalLM"), FILES, task="generate") == "generate"
    # Cross-encoders have such files too, but without pooling.
    assert task_of(config("BertForSequenceClassification"), SentenceTransformersFiles()) == "classify"


def test_one_class_makes_a_model_for_pairs() -> None:
    hf_config = config("BertForSequenceClassification", num_labels=1)
    for args in ({}, {"task": "score"}, {"task": "classify"}, {"runner": "pooling"}, {"convert": "classify"}):
        assert task_of(hf_config, **args) == "score"
    assert task_of(hf_config, convert="embed") == "embed"
    with pytest.raises(TacoValidationError, match=r"'score' task. Supported tasks: \['classify', 'embed'\]"):
        task_of(config("BertForSequenceClassification", num_labels=3), task="score")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"task": "embedding"}, "embed"),
        ({"runner": "pooling"}, "embed"),
        ({"convert": "embed"}, "embed"),
        ({"runner": "pooling", "convert": "embed"}, "embed"),
        ({"runner": "generate"}, "generate"),
        ({"task": "reward"}, "reward"),
    ],
)
def test_a_language_model_can_be_used_for_more(args: dict[str, Any], expected: str) -> None:
    assert task_of(config("LlamaForCausalLM"), **args) == expected


@pytest.mark.parametrize(
    "args",
    [
        {"task": "embed", "runner": "generate"},
        {"task": "classify", "convert": "embed"},
        {"task": "generate", "runner": "pooling"},
        {"runner": "generate", "convert": "embed"},
    ],
)
def test_contradictions_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(TacoValidationError, match="contradicts"):
        task_of(config("LlamaForCausalLM"), **args)


@pytest.mark.parametrize(
    ("architecture", "task"), [("BertModel", "generate"), ("BertModel", "classify"), ("LlamaForCausalLM", "classify")]
)
def test_what_a_model_cannot_do_is_refused_with_what_it_can(architecture: str, task: str) -> None:
    with pytest.raises(TacoValidationError, match=f"does not support the '{task}' task. Supported tasks: .'embed'"):
        task_of(config(architecture), task=task)


def settings_of(
    hf_config: Any, task: Any, given: PoolerConfig | None = None, files: SentenceTransformersFiles | None = None
) -> Any:
    architecture = find_architecture(hf_config)
    assert architecture is not None
    return resolve_pooler(given or PoolerConfig(), task, hf_config, architecture, files)


def test_pooling_is_the_callers_else_that_of_the_files_else_that_of_the_architecture() -> None:
    assert settings_of(config("LlamaModel"), "embed").seq_pooling_type == "LAST"
    assert settings_of(config("BertModel"), "embed").seq_pooling_type == "CLS"
    assert settings_of(config("BertModel"), "embed", files=FILES).seq_pooling_type == "MEAN"
    assert settings_of(config("BertModel"), "embed", PoolerConfig("LAST"), FILES).seq_pooling_type == "LAST"
    # Files about embeddings say nothing about a classifier; the config of the model may.
    bert = config("BertForSequenceClassification", classifier_pooling="mean")
    assert settings_of(bert, "classify", files=FILES).seq_pooling_type == "MEAN"
    assert settings_of(config("BertForSequenceClassification"), "classify", files=FILES).seq_pooling_type == "CLS"


def test_embeddings_are_normalised_unless_the_files_or_the_caller_say_no() -> None:
    plain = SentenceTransformersFiles(seq_pooling_type="MEAN")
    assert settings_of(config("BertModel"), "embed").use_activation
    assert settings_of(config("BertModel"), "embed", files=FILES).use_activation
    assert not settings_of(config("BertModel"), "embed", files=plain).use_activation
    assert not settings_of(config("BertModel"), "embed", PoolerConfig(normalize=False), FILES).use_activation


def test_rewards_are_raw_but_those_of_steps() -> None:
    assert not settings_of(config("Qwen2ForRewardModel"), "reward").use_activation
    steps = settings_of(config("Qwen2ForProcessRewardModel"), "reward")
    assert steps.use_activation and steps.pooling_type == "STEP"


def test_columns_must_be_there() -> None:
    given = PoolerConfig(returned_token_ids=[1, 5])
    for hf_config, num_logits in (
        (config("Qwen2ForRewardModel", num_labels=5), 5),
        (config("BertForTokenClassification", num_labels=5), 5),
        (config("LlamaForCausalLM", vocab_size=5, num_labels=9), 5),
    ):
        task = "classify" if "Bert" in hf_config.architectures[0] else "reward"
        assert settings_of(hf_config, task).num_logits == num_logits
        with pytest.raises(TacoValidationError, match="returned_token_ids has 5, but the model makes 5 numbers"):
            settings_of(hf_config, task, given)
    assert settings_of(config("LlamaForCausalLM", vocab_size=6), "reward", given).returned_token_ids == (1, 5)
    assert settings_of(config("BertModel"), "embed").num_logits is None


def test_the_default_task_of_a_request_can_be_chosen() -> None:
    settings = settings_of(config("BertModel"), "embed", PoolerConfig(task="token_embed"))
    assert settings.tasks == ("token_embed", "embed") and settings.pooling_type == "ALL"
    with pytest.raises(TacoValidationError, match="not one of"):
        settings_of(config("BertModel"), "embed", PoolerConfig(task="classify"))


def test_the_activation_may_be_named_beside_the_config() -> None:
    files = SentenceTransformersFiles(activation="torch.nn.modules.linear.Identity")
    hf_config = config("BertForSequenceClassification", num_labels=1)
    assert settings_of(hf_config, "score", files=files).activation == "identity"
    assert settings_of(hf_config, "score").activation == "sigmoid"


def test_unknown_activations_are_refused() -> None:
    hf_config = config("BertForSequenceClassification", sbert_ce_default_activation_function="torch.nn.ReLU")
    with pytest.raises(TacoValidationError, match="ReLU"):
        settings_of(hf_config, "classify")


def test_encoders_neither_split_nor_cache_prompts() -> None:
    args = for_encoder(EngineArgs())
    assert args.enable_chunked_prefill is False and args.enable_prefix_caching is False
    for name, value in (
        ("enable_chunked_prefill", True),
        ("enable_prefix_caching", True),
        ("long_prefill_token_threshold", 4),
    ):
        with pytest.raises(TacoValidationError, match=name):
            for_encoder(EngineArgs(**{name: value}))


def test_positions_after_padding_do_not_count() -> None:
    roberta = config("RobertaModel", model_type="roberta", max_position_embeddings=514, pad_token_id=1)
    assert resolve_max_model_len(roberta, EngineArgs()) == 512
    with pytest.raises(TacoValidationError, match="the model has 512 positions"):
        resolve_max_model_len(roberta, EngineArgs(max_model_len=513))


def test_length_of_training_is_a_default_that_can_be_raised() -> None:
    bert = config("BertModel", max_position_embeddings=512)
    assert resolve_max_model_len(bert, EngineArgs(), 256) == 256
    assert resolve_max_model_len(bert, EngineArgs(max_model_len=512), 256) == 512


def test_halved_float32_of_pooling_models_is_float16() -> None:
    assert resolve_dtype("auto", "float32", "bert", "cuda", V0_33, pools=True) == "float16"
    assert resolve_dtype("auto", "bfloat16", "bert", "cuda", V0_33, pools=True) == "bfloat16"
