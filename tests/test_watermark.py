"""The numbers of watermarks, and their detection."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.watermark import (
    MAX_GUMBEL,
    MIN_GUMBEL,
    DualKeyGumbelWatermarkDetector,
    GumbelWatermarkDetector,
    WatermarkConfig,
    context_words,
    detect,
    gamma_survival,
    token_words,
    uniforms,
)


def word(key: int, context: list[int], token_id: int) -> int:
    words = context_words(np.array([context]), WatermarkConfig(key=key).key_words())
    return int(token_words(np.array([token_id >> 2]), words)[token_id & 3][0])


def test_numbers_are_those_that_vllm_has_published() -> None:
    contexts = ([1, 2, 3, 4], [4, 5, 6, 7])
    found = [[word(42, context, token_id) for token_id in (7, 8)] for context in contexts]
    assert found == [[425429266, 2706218805], [2494036831, 3424185538]]


def test_numbers_depend_on_key_context_width_order_and_token() -> None:
    found = [
        word(42, [1, 2, 3], 7),
        word(43, [1, 2, 3], 7),
        word(42 + (1 << 32), [1, 2, 3], 7),
        word(42, [2, 1, 3], 7),
        word(42, [1, 2, 3, -1], 7),
        word(42, [-1, 1, 2, 3], 7),
        word(42, [1, 2, 3, 0, 0], 7),
        word(42, [1, 2, 3], 6),
    ]
    assert len(set(found)) == len(found)
    # Contexts and keys of a batch do not mix.
    together = context_words(np.array([[1, 2, 3], [2, 1, 3]]), WatermarkConfig(key=42).key_words().repeat(2, 0))
    assert [int(words[0]) for words in token_words(np.array([1]), together[:, :1])][3] == found[0]
    assert [int(words[0]) for words in token_words(np.array([1]), together[:, 1:])][3] == found[3]


def test_uniform_numbers_lie_strictly_between_0_and_1_on_both_sides_of_the_bridge() -> None:
    words = np.r_[0, 255, 256, (1 << 32) - 1, np.random.default_rng(0).integers(0, 1 << 32, 1000)]
    found = uniforms(words)
    assert found.min() > 0 and found.max() < 1 and found.dtype == np.float64
    assert np.array_equal(found, found.astype(np.float32)) and found[0] == found[1] < found[2]
    assert np.array_equal(uniforms(torch.from_numpy(words)).numpy(), found)
    noise = -np.log(-np.log(found))
    assert MIN_GUMBEL < noise.min() < MIN_GUMBEL + 0.1 and MAX_GUMBEL - 0.1 < noise.max() < MAX_GUMBEL


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"key": -1}, TacoValidationError, r"key must be an integer in \[0, 2\*\*64\)\.$"),
        ({"key": 1 << 64}, TacoValidationError, "key must be"),
        ({"key": True}, TacoValidationError, "key must be"),
        (
            {"algorithm": "sbw"},
            UnsupportedFeatureError,
            "algorithm must be one of 'gumbel', 'dual_key_gumbel', got 'sbw'",
        ),
        ({"alpha": 1.5}, TacoValidationError, "alpha must be a number in"),
        ({"context_width": 0}, TacoValidationError, "context_width must be an integer of at least 1"),
        ({"deduplicate_contexts": True}, TacoValidationError, "deduplicate_contexts must be one of 'none'"),
        ({"deduplicate_contexts_max_history": 0}, TacoValidationError, "deduplicate_contexts_max_history must be"),
        ({"prf": "md5"}, UnsupportedFeatureError, "prf must be 'philox'"),
        ({"allow_target_only_watermarking": 1}, TacoValidationError, "must be a bool"),
        ({"gamma": 0.5}, UnsupportedFeatureError, "'gamma' is not known; there are key, algorithm"),
    ],
)
def test_wrong_configs_are_refused_by_name(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WatermarkConfig.from_mapping({"key": 1, **fields})
    with pytest.raises(TacoValidationError, match="must have a secret key"):
        WatermarkConfig.from_mapping({"alpha": 0.1})


def test_the_key_is_not_shown() -> None:
    config = WatermarkConfig(key=123456789)
    assert "123456789" not in repr(config) and config.context_width == 4
    with pytest.raises(TacoValidationError) as caught:
        WatermarkConfig(key=-123456789)
    assert "123456789" not in str(caught.value)


def test_two_keys_are_derived_from_one() -> None:
    one, two = WatermarkConfig(key=5), WatermarkConfig(key=5, algorithm="dual_key_gumbel")
    assert one.key_words().tolist() == [[5, 0]]
    found = two.key_words()
    assert found.shape == (2, 2) and len(np.unique(np.r_[found.ravel(), 5])) == 5
    assert not np.array_equal(found, WatermarkConfig(key=6, algorithm="dual_key_gumbel").key_words())


@pytest.mark.parametrize("shape", [0.5, 1.0, 3.7, 64.0, 78.05, 1000.5])
def test_gamma_survival_equals_torch(shape: float) -> None:
    for factor in (0.0, 0.2, 0.8, 0.99, 1.0, 1.01, 1.3, 2.0):
        value = shape * factor
        expected = torch.special.gammaincc(*torch.tensor([shape, value], dtype=torch.float64)).item()
        assert gamma_survival(shape, value) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def marked(key: int, num_tokens: int, vocab: int = 50, width: int = 4) -> list[int]:
    """Tokens drawn from a uniform distribution with the numbers of a key, where contexts are new."""
    tokens: list[int] = []
    for _ in range(num_tokens):
        context = [-1] * max(0, width - len(tokens)) + tokens[-width:]
        tokens.append(int(np.argmax([word(key, context, token_id) for token_id in range(vocab)])))
    return tokens


def test_the_score_is_the_one_by_hand() -> None:
    tokens = [3, 1, 2, 1, 2, 1]
    contexts = [[-1, -1], [-1, 3], [3, 1], [1, 2], [2, 1], [1, 2]]
    scores = [
        -math.log(1 - float(np.float32(((word(9, context, token) >> 8) + 1) / (2**24 + 1))))
        for context, token in zip(contexts, tokens, strict=True)
    ]
    config = {"key": 9, "context_width": 2}
    found = detect(tokens, config)
    assert found.score == pytest.approx(sum(scores[:5])) and found.num_scored_tokens == 5  # [1, 2] counts once
    assert found.p_value == pytest.approx(gamma_survival(5, sum(scores[:5])))
    everything = detect(tokens, config, deduplicate_contexts=False)
    assert everything.score == pytest.approx(sum(scores)) and everything.num_scored_tokens == 6


def test_marked_tokens_are_found_with_their_key_also_in_a_part_of_the_text() -> None:
    tokens = marked(42, 40)
    assert detect(tokens, {"key": 42}).p_value < 1e-12
    assert detect(tokens[11:], {"key": 42}).p_value < 1e-6
    assert detect(tokens, {"key": 42}).is_watermarked and not detect(tokens, {"key": 43}).is_watermarked
    assert not detect(tokens, {"key": 42, "context_width": 3}).is_watermarked
    assert detect(tokens, {"key": 42}, p_value_threshold=1e-300).is_watermarked is False
    assert detect([], {"key": 42}) == type(detect([], {"key": 42}))(0.0, 1.0, 0, False)
    with pytest.raises(TacoValidationError, match="p_value_threshold"):
        detect(tokens, {"key": 42}, p_value_threshold=1.0)


@pytest.mark.parametrize("config", [{}, {"algorithm": "dual_key_gumbel", "alpha": 0.3}], ids=str)
def test_p_values_of_unmarked_tokens_are_uniform(config: dict[str, Any]) -> None:
    generator = np.random.default_rng(1)
    values = np.sort([detect(generator.integers(0, 1000, 60), {"key": 7, **config}).p_value for _ in range(400)])
    distance = np.abs(values - (np.arange(400) + 0.5) / 400).max()  # Kolmogorov and Smirnov: above 0.085 in 0.6 %
    assert distance < 0.085


def test_detectors_by_vllms_names_are_detect() -> None:
    tokens = marked(42, 20)
    assert GumbelWatermarkDetector(key=42).detect(tokens) == detect(tokens, {"key": 42})
    assert GumbelWatermarkDetector(42, 2, 0.5, deduplicate_contexts=False).detect(tokens) == detect(
        tokens, {"key": 42, "context_width": 2}, p_value_threshold=0.5, deduplicate_contexts=False
    )
    assert DualKeyGumbelWatermarkDetector(key=42, alpha=0.4).detect(tokens) == detect(
        tokens, {"key": 42, "algorithm": "dual_key_gumbel", "alpha": 0.4}
    )
