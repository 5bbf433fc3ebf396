"""Pooling models through `LLM`, against transformers in float32 with the same tiny random weights."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from taco import LLM, PoolingParams
from taco.compat import V0_33
from taco.errors import BatchValidationError, TacoError, TacoValidationError, UnsupportedFeatureError
from taco.pooling_params import PoolerConfig
from tests.tiny_pooling_models import (
    ENCODERS,
    FAMILIES,
    TEXTS,
    hidden_states,
    logits_of,
    save_model,
    write_sentence_transformers_files,
)
from tests.tiny_tokenizers import byte_level_tokenizer

TOLERANCE = 1e-4

MakeLLM = Callable[..., LLM]


@pytest.fixture
def make_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLLM]:
    """Makes an LLM of the test's folder; all are closed at the end."""
    made: list[LLM] = []
    monkeypatch.setattr("taco.worker.worker.gc.collect", lambda: 0)  # most of the time of these tests

    def make(**options: Any) -> LLM:
        small = {"dtype": "float32", "kv_cache_memory_bytes": 1 << 22, "swap_space": 0.001}
        llm = LLM(str(tmp_path), **small | options)
        made.append(llm)
        return llm

    yield make
    for llm in made:
        llm.close()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An embedding model that several tests use."""
    folder = tmp_path_factory.mktemp("bert")
    save_model(folder, "bert")
    with LLM(str(folder), dtype="float32") as llm:
        yield llm


def chunked(model_type: str) -> dict[str, Any]:
    """Options that split the prompts of a decoder over several steps, which also several prompts share."""
    return {} if model_type in ENCODERS else {"max_num_batched_tokens": 24, "max_num_seqs": 3}


def close(actual: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), expected, atol=TOLERANCE, rtol=0)


def quiet(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return method(*args, use_tqdm=False, **kwargs)


# Models


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hidden_states_of_all_tokens_equal_transformers(model_type: str, tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, model_type)
    llm = make_llm(task="embed", **chunked(model_type))
    params = PoolingParams(task="token_embed", use_activation=False)
    for output in quiet(llm.encode, TEXTS, params):
        expected = hidden_states(model, output.prompt_token_ids)
        assert expected.std() > 0.3
        close(output.outputs.data, expected)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_classes_equal_transformers(model_type: str, tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, model_type, "AutoModelForSequenceClassification", num_labels=3)
    llm = make_llm(**chunked(model_type))
    assert llm.runner_type == "pooling" and llm.supported_tasks == ("classify", "token_classify")
    for output in quiet(llm.classify, TEXTS):
        assert output.outputs.num_classes == 3
        close(output.outputs.probs, logits_of(model, output_ids(output)).softmax(-1))


def output_ids(output: Any) -> list[int]:
    assert output.finished and output.error is None
    return output.prompt_token_ids


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_classifies_what_its_config_names(pooling: str, tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(
        tmp_path,
        "modernbert",
        "AutoModelForSequenceClassification",
        classifier_pooling=pooling,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        classifier_bias=True,
    )
    for output in quiet(make_llm().classify, TEXTS):
        close(output.outputs.probs, logits_of(model, output.prompt_token_ids).softmax(-1))


@pytest.mark.parametrize("model_type", ENCODERS)
def test_classes_of_tokens_equal_transformers(model_type: str, tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, model_type, "AutoModelForTokenClassification", num_labels=3)
    llm = make_llm()
    for output in quiet(llm.encode, TEXTS):
        close(output.outputs.data, logits_of(model, output.prompt_token_ids).softmax(-1))
    with pytest.raises(TacoValidationError, match="Unsupported task: 'classify'"):
        quiet(llm.classify, TEXTS[0])


@pytest.mark.parametrize("pooling_type", ["CLS", "LAST", "MEAN"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_pooling_types(pooling_type: str, model_type: str, tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, model_type)
    llm = make_llm(pooler_config={"pooling_type": pooling_type}, **chunked(model_type))
    for output in quiet(llm.embed, TEXTS):
        states = hidden_states(model, output.prompt_token_ids)
        pooled = {"CLS": states[0], "LAST": states[-1], "MEAN": states.mean(0)}[pooling_type]
        close(output.outputs.embedding, F.normalize(pooled, dim=0))


def test_a_language_model_embeds_without_its_head(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "llama", "AutoModelForCausalLM", tie_word_embeddings=False)
    llm = make_llm(runner="pooling")
    assert not any("head" in name for name, _ in llm.llm_engine.model_executor.worker.model.named_parameters())
    for output in quiet(llm.embed, TEXTS):
        close(output.outputs.embedding, F.normalize(hidden_states(model.model, output.prompt_token_ids)[-1], dim=0))


def test_prefixes_are_cached_where_only_the_last_token_counts(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "llama")
    prompts = [list(range(3, 40)) + [last] for last in (5, 6, 7)]
    llm = make_llm(enable_prefix_caching=True)
    quiet(llm.embed, prompts[0])
    outputs = quiet(llm.embed, prompts)
    assert all(output.num_cached_tokens >= 32 for output in outputs)
    for output in outputs:
        close(output.outputs.embedding, F.normalize(hidden_states(model, output.prompt_token_ids)[-1], dim=0))
    means = quiet(llm.encode, prompts, PoolingParams(task="token_embed"))
    assert all(output.num_cached_tokens == 0 for output in means)


@pytest.mark.parametrize("preemption_mode", ["swap", "recompute"])
def test_preemption_loses_nothing_of_a_mean(preemption_mode: str, tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "llama")
    llm = make_llm(
        pooler_config={"pooling_type": "MEAN"},
        preemption_mode=preemption_mode,
        max_num_batched_tokens=32,
        long_prefill_token_threshold=8,
        num_gpu_blocks_override=11,
        max_model_len=130,
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 300, length).tolist() for length in (100, 90, 70, 110)]
    outputs = quiet(llm.embed, prompts)
    assert llm.llm_engine.scheduler.num_preemptions > 0
    for output in outputs:
        close(output.outputs.embedding, F.normalize(hidden_states(model, output.prompt_token_ids).mean(0), dim=0))


def test_a_row_does_not_depend_on_its_batch(bert: LLM) -> None:
    batch = quiet(bert.embed, TEXTS, output="numpy")
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(quiet(bert.embed, text, output="numpy")[0], batch[row], atol=1e-6)


# Settings of sentence-transformers


def test_settings_of_sentence_transformers_are_followed(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "bert")
    write_sentence_transformers_files(
        tmp_path,
        normalize=False,
        transformer={"max_seq_length": 20, "do_lower_case": True},
        settings={"prompts": {"query": "hello: ", "document": ""}, "default_prompt_name": "query"},
    )
    llm = make_llm()
    assert llm.model_config.max_model_len == 20
    tokenizer = byte_level_tokenizer(None)
    (plain,) = quiet(llm.embed, "The Cat")
    assert plain.prompt_token_ids == tokenizer("the cat").input_ids
    close(plain.outputs.embedding, hidden_states(model, plain.prompt_token_ids).mean(0))
    for prompt in ("the cat", {"prompt": "the cat"}):
        (asked,) = quiet(llm.embed, [prompt], prompt_name="query")
        assert asked.prompt_token_ids == tokenizer("hello: the cat").input_ids
    with pytest.raises(TacoValidationError, match=r"prompts \['query', 'document'\]"):
        quiet(llm.embed, "the cat", prompt_name="passage")
    with pytest.raises(TacoValidationError, match="not with token ids"):
        quiet(llm.embed, [[3, 4]], prompt_name="query")


def test_a_language_model_with_pooling_settings_is_an_embedding_model(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "qwen3", "AutoModelForCausalLM")
    write_sentence_transformers_files(
        tmp_path, pooling={"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    )
    (output,) = quiet(make_llm().embed, TEXTS[1])
    close(output.outputs.embedding, F.normalize(hidden_states(model.model, output.prompt_token_ids)[-1], dim=0))
    (generated,) = quiet(make_llm(task="generate").generate, TEXTS[1])
    assert generated.outputs[0].token_ids


def test_linear_layers_of_sentence_transformers_are_applied(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "llama")
    write_sentence_transformers_files(tmp_path, projections=("2_Dense", "3_Dense"))
    weights = [torch.randn(24, 32), torch.randn(10, 24)]
    bias = torch.randn(24)
    for name, weight, extra, activation in (
        ("2_Dense", weights[0], {"linear.bias": bias}, "torch.nn.modules.activation.Tanh"),
        ("3_Dense", weights[1], {}, "torch.nn.modules.linear.Identity"),
    ):
        (tmp_path / name).mkdir()
        save_file({"linear.weight": weight, **extra}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"activation_function": activation}))
    for output in quiet(make_llm().embed, TEXTS):
        pooled = hidden_states(model, output.prompt_token_ids).mean(0)
        projected = torch.tanh(pooled @ weights[0].T + bias) @ weights[1].T
        close(output.outputs.embedding, F.normalize(projected, dim=0))


def test_shortened_embeddings_are_normalised_afterwards(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "qwen3", matryoshka_dimensions=[8, 16])
    llm = make_llm()
    (output,) = quiet(llm.embed, TEXTS[0], pooling_params=PoolingParams(dimensions=8))
    expected = hidden_states(model, output.prompt_token_ids)[-1]
    close(output.outputs.embedding, F.normalize(expected[:8], dim=0))
    short = quiet(make_llm(pooler_config=PoolerConfig(dimensions=16)).embed, TEXTS, output="numpy")
    assert short.shape == (len(TEXTS), 16)
    with pytest.raises(TacoValidationError, match=r"supports only \[8, 16\]"):
        quiet(llm.embed, TEXTS[0], pooling_params=PoolingParams(dimensions=9))


def test_dimensions_need_a_model_made_for_them(tmp_path: Path, make_llm: MakeLLM) -> None:
    save_model(tmp_path, "qwen3")
    with pytest.raises(TacoValidationError, match="does not support matryoshka representation"):
        quiet(make_llm().embed, TEXTS[0], pooling_params=PoolingParams(dimensions=8))
    llm = make_llm(hf_overrides={"is_matryoshka": True})
    assert quiet(llm.embed, TEXTS, pooling_params=PoolingParams(dimensions=5), output="numpy").shape[1] == 5
    with pytest.raises(TacoValidationError, match="from 1 to 32"):
        quiet(llm.embed, TEXTS[0], pooling_params=PoolingParams(dimensions=33))


# Scores of pairs


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama"])
def test_pairs_are_scored_as_transformers_does(model_type: str, tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, model_type, "AutoModelForSequenceClassification", num_labels=1)
    llm = make_llm()
    assert llm.model_config.is_cross_encoder
    documents = ["the mat", "the hat and the cat", "hello"]
    tokenizer = byte_level_tokenizer(None)
    for queries in (["the cat"] * 3, "the cat"):
        outputs = quiet(llm.score, queries, documents)
        for output, document in zip(outputs, documents, strict=True):
            token_ids = tokenizer("the cat", document).input_ids
            assert output.prompt_token_ids == token_ids
            expected = logits_of(model, token_ids).sigmoid()
            assert abs(output.outputs.score - float(expected)) < TOLERANCE
    bad = quiet(llm.score, ["the cat", 7], documents[:2], on_error="return")
    assert bad[0].outputs.score == outputs[0].outputs.score and "one is of type int" in bad[1].error
    (one,) = quiet(llm.score, "the cat", documents[0], truncate_prompt_tokens=4)
    assert len(one.prompt_token_ids) == 4
    (classified,) = quiet(llm.classify, "the cat")
    assert 0 < classified.outputs.probs[0] < 1
    (rewarded,) = quiet(llm.reward, "the cat")
    close(rewarded.outputs.data, logits_of(model, rewarded.prompt_token_ids))


def test_token_types_of_a_pair_are_those_of_the_tokenizer(tmp_path: Path, make_llm: MakeLLM) -> None:
    """The byte-level tokenizer marks the second text of a pair as type 1 here, as BERT's does."""
    from tokenizers import processors

    model = save_model(tmp_path, "bert", "AutoModelForSequenceClassification", num_labels=1)
    llm = make_llm()
    llm.get_tokenizer().model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    llm.get_tokenizer().backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    documents = ["the mat", "the hat and the cat " * 3, "hello"]
    scores = quiet(llm.score, "the cat", documents)
    for output, document in zip(scores, documents, strict=True):
        encoded = llm.get_tokenizer()("the cat", document)
        assert 1 in encoded.token_type_ids
        expected = logits_of(model, encoded.input_ids, token_type_ids=encoded.token_type_ids).sigmoid()
        assert abs(output.outputs.score - float(expected)) < TOLERANCE
    prompt = {"prompt_token_ids": encoded.input_ids, "token_type_ids": encoded.token_type_ids}
    (output,) = quiet(llm.encode, [prompt])
    assert abs(float(output.outputs.data) - scores[-1].outputs.score) < 1e-6
    with pytest.raises(TacoValidationError, match="token_type_ids must be a list of 3 integers below 2"):
        quiet(llm.encode, [{"prompt_token_ids": [3, 4, 5], "token_type_ids": [0, 1, 2]}])


def test_embedding_models_score_by_cosine(tmp_path: Path, make_llm: MakeLLM) -> None:
    save_model(tmp_path, "bert")
    llm = make_llm(pooler_config={"normalize": False, "pooling_type": "MEAN"})
    vectors = torch.from_numpy(quiet(llm.embed, TEXTS, output="numpy"))
    scores = [output.outputs.score for output in quiet(llm.score, TEXTS[0], TEXTS)]
    close(scores, F.cosine_similarity(vectors[:1], vectors))
    pairs = quiet(llm.score, TEXTS[:2], [{"prompt": TEXTS[3]}, {"prompt_token_ids": [3, 4]}])
    assert abs(pairs[0].outputs.score - float(F.cosine_similarity(vectors[0], vectors[3], dim=0))) < TOLERANCE
    first, second = (byte_level_tokenizer(None)(TEXTS[1]).input_ids, [3, 4])
    assert pairs[1].prompt_token_ids == [*first, 2, *second]  # the padding token between them


@pytest.mark.parametrize(
    ("firsts", "seconds", "message"),
    [
        ([], ["a"], "At least one text element"),
        (["a"], [], "At least one text_pair element"),
        (["a", "b"], ["c"], "1:1, 1:N or N:N"),
        (["a", "b"], ["c", "d", "e"], "1:1, 1:N or N:N"),
    ],
)
def test_numbers_of_texts_must_fit(firsts: list[str], seconds: list[str], message: str, bert: LLM) -> None:
    with pytest.raises(TacoValidationError, match=message):
        quiet(bert.score, firsts, seconds)


@pytest.mark.parametrize(
    ("firsts", "seconds", "errors"),
    [
        (
            ["a", "b", "c"],
            ["d", "", "x " * 400],
            {1: "second text: .*empty", 2: "second text: .*maximum context length"},
        ),
        ("a", ["d", "", "e"], {1: "second text: .*empty"}),
        (["a", ""], ["", ""], {0: "second text", 1: "first text: .* second text"}),
        ("", ["a", "b"], {0: "first text", 1: "first text"}),
    ],
)
def test_wrong_texts_of_pairs_are_named_by_pair(
    firsts: Any, seconds: list[str], errors: dict[int, str], tmp_path: Path, make_llm: MakeLLM
) -> None:
    save_model(tmp_path, "bert")
    llm = make_llm()
    # Without them an empty text has no tokens.
    options = {"tokenization_kwargs": {"add_special_tokens": False}}
    with pytest.raises(BatchValidationError, match=f"^{len(errors)} of {len(seconds)} rows") as caught:
        quiet(llm.score, firsts, seconds, **options)
    assert caught.value.errors.keys() == errors.keys()
    for index, pattern in errors.items():
        assert re.search(pattern, caught.value.errors[index])
    with pytest.raises(TacoValidationError, match="^second text: .*empty") as single:
        quiet(llm.score, "a", "", **options)
    assert not isinstance(single.value, BatchValidationError)


def test_score_template_makes_one_prompt_of_a_pair(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "llama", "AutoModelForSequenceClassification", num_labels=1)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (output,) = quiet(make_llm().score, "the cat", "the mat", chat_template=template)
    assert output.prompt_token_ids == byte_level_tokenizer(None)("query: the cat\ndocument: the mat\n").input_ids
    assert abs(output.outputs.score - float(logits_of(model, output.prompt_token_ids).sigmoid())) < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_labels": 2}, lambda x: x.softmax(-1)),
        ({"num_labels": 1}, torch.sigmoid),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"num_labels": 1, "problem_type": "regression"}, lambda x: x),
        (
            {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            lambda x: x,
        ),
        (
            {"num_labels": 2, "sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"},
            torch.sigmoid,
        ),
    ],
)
def test_activation_of_classes(settings: dict[str, Any], expected: Any, tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "bert", "AutoModelForSequenceClassification", **settings)
    llm = make_llm()
    (output,) = quiet(llm.classify, TEXTS[0])
    logits = logits_of(model, output.prompt_token_ids)
    close(output.outputs.probs, expected(logits))
    (raw,) = quiet(llm.classify, TEXTS[0], pooling_params=PoolingParams(use_activation=False))
    close(raw.outputs.probs, logits)


def test_logits_are_calibrated_before_the_activation(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "bert", "AutoModelForSequenceClassification", num_labels=1)
    (output,) = quiet(make_llm(pooler_config={"logit_mean": 0.5, "logit_sigma": 2.0}).score, "a", "b")
    expected = ((logits_of(model, output.prompt_token_ids) - 0.5) / 2).sigmoid()
    assert abs(output.outputs.score - float(expected)) < TOLERANCE


# Reward models


def test_reward_models_score_every_token(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "qwen2", num_labels=1)
    first, second, weights = save_reward_head(tmp_path, model, "Qwen2ForRewardModel", 1)
    llm = make_llm(max_num_batched_tokens=24)
    assert llm.model_config.task == "reward" and llm.supported_tasks == ("token_classify",)
    for output in quiet(llm.reward, TEXTS):
        states = hidden_states(model, output.prompt_token_ids)
        close(output.outputs.data, second(F.relu(first(states))))


def test_steps_of_process_reward_models(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "qwen2", num_labels=2)
    first, second, _ = save_reward_head(tmp_path, model, "Qwen2ForProcessRewardModel", 2)
    llm = make_llm(override_pooler_config=PoolerConfig("STEP", step_tag_id=7), max_num_batched_tokens=8)
    prompt = [3, 4, 7, 5, 6, 9, 8, 3, 7, 4, 4, 4, 7]
    (output,) = quiet(llm.encode, [prompt])
    states = hidden_states(model, prompt)[[2, 8, 12]]
    close(output.outputs.data, second(F.relu(first(states))).softmax(-1))
    params = PoolingParams(returned_token_ids=[1], step_tag_id=4, use_activation=False)
    (output,) = quiet(llm.reward, [prompt], pooling_params=params)
    close(output.outputs.data, second(F.relu(first(hidden_states(model, prompt)[[1, 9, 10, 11]])))[:, 1:])
    both = [params, PoolingParams(returned_token_ids=[1, 2])]
    good, bad = quiet(llm.reward, [prompt, prompt], pooling_params=both, on_error="return")
    close(good.outputs.data, output.outputs.data)
    assert "returned_token_ids has 2, but the model makes 2 numbers" in bad.error


@torch.no_grad()
def save_reward_head(folder: Path, model: Any, architecture: str, num_labels: int) -> Any:
    size = model.config.hidden_size
    first, second = torch.nn.Linear(size, size), torch.nn.Linear(size, num_labels)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, layer in ((0, first), (2, second)):
        tensors |= {f"score.{index}.weight": layer.weight, f"score.{index}.bias": layer.bias}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    return (lambda x: first(x).detach()), (lambda x: second(x).detach()), tensors


def test_a_language_model_is_a_reward_model_by_its_logits(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "llama", "AutoModelForCausalLM")
    config = PoolerConfig("STEP", step_tag_id=7, returned_token_ids=[10, 20], softmax=True)
    prompt = [3, 4, 7, 5, 6, 9, 7]
    (output,) = quiet(make_llm(task="reward", override_pooler_config=config).reward, [prompt])
    close(output.outputs.data, logits_of(model, prompt)[[2, 6]][:, [10, 20]].softmax(-1))


# Prompts and errors


def test_truncation_keeps_special_tokens_and_the_side_of_the_tokenizer(tmp_path: Path, make_llm: MakeLLM) -> None:
    save_model(tmp_path, "bert")
    llm = make_llm(max_model_len=16)
    ids = byte_level_tokenizer(None)(TEXTS[1]).input_ids

    def tokens(**kwargs: Any) -> list[int]:
        (output,) = quiet(llm.embed, TEXTS[1], **kwargs)
        return output.prompt_token_ids

    assert tokens(truncate_prompt_tokens=5) == ids[:5]
    assert tokens(tokenization_kwargs={"truncate_prompt_tokens": -1}) == ids[:16]
    assert tokens(tokenization_kwargs={"truncation": True, "max_length": 6}) == ids[:6]
    left = tokens(tokenization_kwargs={"truncate_prompt_tokens": 5, "truncation_side": "left"})
    assert left == [ids[0], *ids[-4:]]  # the start token stays
    assert llm.get_tokenizer().truncation_side == "right"
    (output,) = quiet(llm.embed, [ids], tokenization_kwargs={"truncate_prompt_tokens": 5, "truncation_side": "left"})
    assert output.prompt_token_ids == ids[-5:]


def test_over_long_prompts_are_errors_that_say_what_to_do(tmp_path: Path, make_llm: MakeLLM) -> None:
    save_model(tmp_path, "bert")
    llm = make_llm(max_model_len=16)
    with pytest.raises(TacoValidationError, match="maximum context length is 16 .*pass truncate_prompt_tokens=-1"):
        quiet(llm.embed, TEXTS[1])
    with pytest.raises(BatchValidationError) as caught:
        quiet(llm.embed, [TEXTS[0], TEXTS[1], [], [9999]])
    assert sorted(caught.value.errors) == [1, 2, 3]
    outputs = quiet(llm.embed, [TEXTS[0], TEXTS[1], [], TEXTS[4]], on_error="return")
    assert [output.error is None for output in outputs] == [True, False, False, True]
    assert outputs[1].outputs is None and "maximum context length" in outputs[1].error
    assert outputs[0].outputs.embedding == outputs[3].outputs.embedding
    array = quiet(llm.embed, [TEXTS[0], TEXTS[1]], on_error="return", output="numpy")
    assert np.isfinite(array[0]).all() and np.isnan(array[1]).all()
    scores = quiet(llm.score, TEXTS[0], [TEXTS[1], TEXTS[4]], on_error="return")
    assert scores[0].error is not None and abs(scores[1].outputs.score - 1) < 1e-6


def test_a_result_that_is_not_finite_is_an_error_of_its_row(tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, "bert")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5] = float("nan")
    model.save_pretrained(tmp_path)
    outputs = quiet(make_llm().embed, [[3, 4], [3, 5], [4, 3]], on_error="return")
    assert [output.error is None for output in outputs] == [True, False, True]
    assert "not finite" in outputs[1].error
    firsts, seconds = ([{"prompt_token_ids": ids} for ids in part] for part in ([[3], [5]], [[3], [5, 4]]))
    error = quiet(make_llm().score, firsts, seconds, on_error="return")[1].error
    assert re.fullmatch("first text: .*not finite.* second text: .*not finite.*", error)
    with pytest.raises(TacoError, match=r"Row 1 \((first|second) text\) failed while it ran") as caught:
        quiet(make_llm().score, firsts, seconds)
    assert not hasattr(caught.value, "finished_outputs")


def test_numpy_is_the_same_numbers_in_one_array(bert: LLM) -> None:
    array = quiet(bert.embed, TEXTS, output="numpy")
    assert array.dtype == np.float32 and array.shape == (len(TEXTS), 32)
    assert array.tolist() == [output.outputs.embedding for output in quiet(bert.embed, TEXTS)]
    assert quiet(bert.embed, [], output="numpy").shape == (0, 32)
    assert quiet(bert.embed, iter(TEXTS), output="numpy").tolist() == array.tolist()
    with pytest.raises(TacoValidationError, match='"outputs" or "numpy"'):
        quiet(bert.embed, TEXTS, output="list")


def test_outputs_come_in_input_order_with_growing_ids(bert: LLM) -> None:
    outputs = quiet(bert.encode, TEXTS) + quiet(bert.encode, TEXTS[:1])
    numbers = [int(output.request_id) for output in outputs]
    assert numbers == list(range(numbers[0], numbers[0] + len(TEXTS) + 1))
    tokenizer = byte_level_tokenizer(None)
    assert [output.prompt_token_ids for output in outputs[: len(TEXTS)]] == tokenizer(TEXTS).input_ids


def test_legacy_prompt_token_ids(bert: LLM) -> None:
    with pytest.warns(DeprecationWarning, match="prompt_token_ids is deprecated") as caught:
        outputs = bert.encode(prompt_token_ids=[[3, 4], [5]], use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [[3, 4], [5]]
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(ValueError, match="Either prompts or prompt_token_ids must be provided"):
        bert.encode(None)


def test_params_are_one_for_all_or_one_each_and_not_changed(bert: LLM) -> None:
    plain, raw = PoolingParams(), PoolingParams(use_activation=False)
    first, second = quiet(bert.embed, TEXTS[:2], pooling_params=[plain, raw])
    assert abs(np.linalg.norm(first.outputs.embedding) - 1) < 1e-5 < abs(np.linalg.norm(second.outputs.embedding) - 1)
    assert plain == PoolingParams() and raw == PoolingParams(use_activation=False)
    with pytest.raises(TacoValidationError, match="lengths of prompts and params must be the same"):
        quiet(bert.embed, TEXTS[:2], pooling_params=[plain])
    with pytest.raises(TacoValidationError, match="cannot overwrite"):
        quiet(bert.embed, TEXTS[0], pooling_params=PoolingParams(task="token_embed"))
    with pytest.raises(TacoValidationError, match="must be a PoolingParams"):
        quiet(bert.embed, TEXTS[0], pooling_params={"dimensions": 3})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"task": "classify"}, "Unsupported task: 'classify'"),
        ({"task": "score"}, "not the name of a task any more: use classify"),
        ({"step_tag_id": 3}, "step_tag_id=3 means nothing for the task 'embed'"),
        ({"dimensions": 0}, "dimensions must be at least 1"),
        ({"use_activation": "yes"}, "use_activation must be a bool"),
        ({"late_chunking_params": object()}, "late_chunking_params is not supported"),
    ],
)
def test_wrong_params_are_refused(params: dict[str, Any], message: str, bert: LLM) -> None:
    with pytest.raises(TacoValidationError, match=message):
        quiet(bert.encode, TEXTS[0], PoolingParams(**params))


def test_methods_refuse_models_that_are_not_for_them(tmp_path: Path, make_llm: MakeLLM) -> None:
    save_model(tmp_path, "llama", "AutoModelForCausalLM")
    llm = make_llm()
    advice = {
        llm.encode: "task='embed' is passed",
        llm.embed: "task='embed' is passed",
        llm.classify: "It cannot do this: its tasks are 'embed', 'generate', 'reward'",
        llm.reward: "task='reward' is passed",
    }
    for method, text in advice.items():
        with pytest.raises(TacoValidationError, match=f"only supported for pooling models.* {text}"):
            method("a")
    with pytest.raises(TacoValidationError, match="only supported for pooling models"):
        llm.score("a", "b")
    llm = make_llm(task="embed")
    with pytest.raises(TacoValidationError, match="only enabled for `--task classify`.* It cannot do this"):
        llm.classify("a")
    for method in (llm.generate, llm.chat):
        with pytest.raises(TacoValidationError, match="only supported for .* generation models.*task='generate'"):
            method("a")


@pytest.mark.parametrize("method", ["encode", "embed"])
def test_an_empty_list_of_prompts_is_an_error_in_033(bert: LLM, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert getattr(bert, method)([]) == []
    engine = bert.llm_engine
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, behaviour=V0_33))
    with pytest.raises(ValueError, match="You must pass at least one prompt"):
        getattr(bert, method)([])


def test_models_for_several_classes_score_no_pairs(tmp_path: Path, make_llm: MakeLLM) -> None:
    save_model(tmp_path, "bert", "AutoModelForSequenceClassification", num_labels=3)
    llm = make_llm()
    with pytest.raises(
        TacoValidationError,
        match="Embedding API is only enabled for `--task embed`.*task='embed' is.*--convert embed|classify",
    ):
        llm.embed("a")
    with pytest.raises(TacoValidationError, match="does not support cross encoding"):
        llm.score("a", "b")
    assert len(quiet(make_llm(convert="embed").embed, "a")[0].outputs.embedding) == 32


def test_bidirectional_decoders_are_refused(tmp_path: Path, make_llm: MakeLLM) -> None:
    save_model(tmp_path, "llama", is_causal=False)
    with pytest.raises(UnsupportedFeatureError, match="attention in both directions"):
        make_llm()


def test_engine_takes_pooling_requests_step_by_step(bert: LLM) -> None:
    engine = bert.llm_engine
    engine.add_request("x", "the cat", PoolingParams())
    with pytest.raises(TacoValidationError, match="in use"):
        engine.add_request("x", "the cat", PoolingParams())
    engine.add_request("y", "the mat", PoolingParams())
    engine.abort_request("y")
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == ["x"]
    assert outputs[0].outputs.data.shape == (32,)
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_scores_by_the_logits_of_two_tokens(tied: bool, tmp_path: Path, make_llm: MakeLLM) -> None:
    """As rerankers that answer yes or no are used with vLLM."""
    model = save_model(tmp_path, "qwen3", "AutoModelForCausalLM", tie_word_embeddings=tied)
    overrides = {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["a", "b"]}
    llm = make_llm(hf_overrides=overrides | {"is_original_qwen3_reranker": True})
    (output,) = quiet(llm.score, "the cat", "the mat")
    no, yes = byte_level_tokenizer(None).convert_tokens_to_ids(["a", "b"])
    logits = logits_of(model, output.prompt_token_ids)[-1]
    assert abs(output.outputs.score - float(logits[[no, yes]].softmax(-1)[1])) < TOLERANCE
    (classified,) = quiet(make_llm(hf_overrides=overrides).classify, "the cat")
    close(classified.outputs.probs, logits_of(model, classified.prompt_token_ids)[-1][[no, yes]].softmax(-1))
    with pytest.raises(TacoValidationError, match=r"does not have \['nothing'\]"):
        make_llm(hf_overrides=overrides | {"classifier_from_token": ["a", "nothing"]})


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_planning_ahead_changes_no_result(model_type: str, tmp_path: Path, make_llm: MakeLLM) -> None:
    model = save_model(tmp_path, model_type)
    llm = make_llm(async_scheduling=True, pooler_config={"pooling_type": "MEAN"}, **chunked(model_type))
    for output in quiet(llm.embed, TEXTS * 2):
        close(output.outputs.embedding, F.normalize(hidden_states(model, output.prompt_token_ids).mean(0), dim=0))


def test_texts_of_an_encoder_run_in_the_order_of_their_lengths(bert: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    runner = bert.llm_engine.model_executor.worker.runner
    submit = type(runner).submit

    def record(self: Any, plan: Any) -> Any:
        lengths.extend(plan.num_tokens)
        return submit(self, plan)

    monkeypatch.setattr(type(runner), "submit", record)
    for prompts in (TEXTS, iter(TEXTS)):
        lengths.clear()
        quiet(bert.embed, prompts)
        assert lengths == sorted(lengths) and len(lengths) == len(TEXTS)
