"""Watermarks in texts: how drawn tokens are marked, and how the mark is found again.

Scott Aaronson's scheme (lecture notes, 2022): instead of with a random number, each token is drawn with numbers that a
secret key and the tokens before it determine, one for each token of the vocabulary. The token with the largest sum of
logit and Gumbel noise is taken, which over all keys is a draw from the model's distribution. Whoever knows the key sees
that the tokens of a text have larger numbers than chance would give them; neither model nor prompt is needed.

"dual_key_gumbel" divides the tokens between two keys, as the SynthID-Text paper does for speculative decoding
(Dathathri et al., "Scalable watermarking for identifying large language model outputs", Nature 2024, supplement).
Context deduplication is from there too.

The numbers are those of vLLM 0.33 with the PRF "philox", so texts of either engine are recognised by the other's
detector. They come from Philox4x32-10. All words below are 32 bits wide and held in int64 arrays of numpy or tensors of
torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.philox import philox4x32

ALGORITHMS = ("gumbel", "dual_key_gumbel")
SCOPES = ("none", "single_turn", "all")
PADDING_TOKEN = -1  # stands in contexts for tokens before the first of the output

_MASK = 0xFFFFFFFF
_CONTEXT_DOMAIN = 0x574D4358  # "WMCX": keeps the two uses of the generator apart
_TOKEN_DOMAIN = 0x574D544B  # "WMTK"
_NUM_FRACTIONS = 1 << 24


def _one_of(names: tuple[str, ...]) -> str:
    return "one of " + ", ".join(map(repr, names))


@dataclass(frozen=True, kw_only=True)
class WatermarkConfig:
    """How texts are marked. Whoever knows it, the key above all, can detect the mark, and can forge it.

    Args:
        key: the secret, an integer in [0, 2**64); not shown by `repr`.
        algorithm: "gumbel" (one key), or "dual_key_gumbel" (two keys, derived from `key`).
        alpha: share of tokens that the second key of "dual_key_gumbel" marks, in [0, 1].
        context_width: tokens before a token that determine its numbers, >= 1; None for 4. With more of them, an edit of
            the text spoils the mark of more tokens after it.
        deduplicate_contexts: where a context occurs again, its numbers would favour the same token again; there, the
            token is drawn without a mark. "single_turn" looks for earlier occurrences in the output, "all" in prompt
            and output (and leaves the first `context_width` tokens unmarked), "none" nowhere: texts may then fall into
            loops.
        deduplicate_contexts_max_history: how many of the last positions are searched, >= 1; None for all.
        prf: "philox".
        allow_target_only_watermarking: without effect, as there is no speculative decoding.

    Raises:
        TacoValidationError: naming the field.
    """

    key: int = field(repr=False)
    algorithm: Literal["gumbel", "dual_key_gumbel"] = "gumbel"
    alpha: float = 0.1
    context_width: int | None = None
    deduplicate_contexts: Literal["none", "single_turn", "all"] = "single_turn"
    deduplicate_contexts_max_history: int | None = 8192
    prf: Literal["philox"] = "philox"
    allow_target_only_watermarking: bool = False

    def __post_init__(self) -> None:
        def require(name: str, is_right: bool, what: str, cls: type[TacoValidationError] = TacoValidationError) -> None:
            if not is_right:
                shown = "" if name == "key" else f", got {getattr(self, name)!r}"
                raise cls(f"{name} must be {what}{shown}.", parameter=name)

        def is_int(value: object, least: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        require("key", is_int(self.key, 0) and self.key < 1 << 64, "an integer in [0, 2**64)")
        require("algorithm", self.algorithm in ALGORITHMS, _one_of(ALGORITHMS), UnsupportedFeatureError)
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        require("alpha", is_number and 0 <= self.alpha <= 1, "a number in [0, 1]")
        width, max_history = self.context_width, self.deduplicate_contexts_max_history
        require("context_width", width is None or is_int(width, 1), "an integer of at least 1, or None")
        require("deduplicate_contexts", self.deduplicate_contexts in SCOPES, _one_of(SCOPES))
        require(
            "deduplicate_contexts_max_history",
            max_history is None or is_int(max_history, 1),
            "an integer of at least 1, or None",
        )
        require("prf", self.prf == "philox", "'philox'", UnsupportedFeatureError)
        require("allow_target_only_watermarking", isinstance(self.allow_target_only_watermarking, bool), "a bool")
        if width is None:
            object.__setattr__(self, "context_width", 4)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> WatermarkConfig:
        """From the fields as a dict. Raises TacoValidationError if there is no key, and for names it does not know."""
        names = [item.name for item in fields(cls)]
        if unknown := [name for name in values if name not in names]:
            raise UnsupportedFeatureError(f"{unknown[0]!r} is not known; there are {', '.join(names)}.")
        if "key" not in values:
            raise TacoValidationError('must have a secret key, as in {"key": 42}.', parameter="key")
        return cls(**values)

    @property
    def width(self) -> int:
        """`context_width`, which construction has completed."""
        assert self.context_width is not None
        return self.context_width

    def key_words(self) -> np.ndarray:
        """The keys that mark tokens, as low and high word, int64 [1 or 2, 2]; the second one marks a share `alpha`."""
        keys = [self.key]
        if self.algorithm == "dual_key_gumbel":
            secret = self.key.to_bytes(8, "big")
            keys = [int.from_bytes(hashlib.sha256(name + secret).digest()[:8], "big") for name in (b"key_a", b"key_b")]
        return np.array([[key & _MASK, key >> 32] for key in keys], np.int64)


# ----------------------------------------------------------------------------------------------------------------------
# The numbers
# ----------------------------------------------------------------------------------------------------------------------


def context_words(contexts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """What the numbers of the tokens after a context have in common.

    Args:
        contexts: int64 [n, width].
        keys: words of the key of each, int64 [n, 2].

    Returns:
        int64 [5, n]: three words of a counter, two of a key; for `token_words`.
    """
    num_contexts, width = contexts.shape
    padding = _MASK - np.arange(width, width + -width % 4) % 4
    blocks = np.concatenate((contexts & _MASK, np.tile(padding, (num_contexts, 1))), 1).T  # [width rounded up, n]
    k0, k1 = keys.T
    zeros = np.zeros(num_contexts, np.int64)
    state: tuple[Any, ...] = (zeros + _CONTEXT_DOMAIN, zeros + width, zeros, zeros)
    for start in range(0, len(blocks), 4):
        block = blocks[start : start + 4]
        state = philox4x32([word ^ own for word, own in zip(state, block, strict=True)], (k0 ^ start, k1))
    return np.stack((*state[:3], k0 ^ state[3], k1 ^ _TOKEN_DOMAIN))


def token_words(groups: Any, words: Any) -> tuple[Any, Any, Any, Any]:
    """The words of four tokens each: those with ids 4 * group to 4 * group + 3.

    Args:
        groups: token ids over 4.
        words: five, as of `context_words`.
    """
    return philox4x32((groups, *words[:3]), words[3:])


def uniforms(words: Any) -> Any:
    """Numbers in (0, 1) from an array or a tensor of words; float64 with the 24 bits of a float32."""
    # The nearest float32 is part of the definition, and what follows needs more precision.
    if isinstance(words, np.ndarray):
        return (((words >> 8) + 1.0) / (_NUM_FRACTIONS + 1)).astype(np.float32).astype(np.float64)
    return (((words >> 8).double() + 1) / (_NUM_FRACTIONS + 1)).float().double()


# The least and the largest Gumbel noise, -log(-log(u)), that `uniforms` can lead to.
MIN_GUMBEL = -math.log(math.log(_NUM_FRACTIONS + 1)) - 1e-3
MAX_GUMBEL = -math.log(-math.log1p(-(2.0**-24))) + 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Detection
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WatermarkDetection:
    """Result of `detect`.

    Args:
        score: sum of the scores of the tokens; `num_scored_tokens` is what chance gives.
        p_value: probability of such a score, or a larger one, in a text without this mark.
        num_scored_tokens: tokens that count.
        is_watermarked: `p_value` is at most the threshold.
    """

    score: float
    p_value: float
    num_scored_tokens: int
    is_watermarked: bool


def detect(
    token_ids: Iterable[int],
    config: WatermarkConfig | Mapping[str, Any],
    *,
    p_value_threshold: float = 0.01,
    deduplicate_contexts: bool = True,
) -> WatermarkDetection:
    """Whether tokens have the mark of a config.

    Take `CompletionOutput.token_ids`, or `tokenizer.encode(text, add_special_tokens=False)` with the tokenizer of the
    model, without the prompt. A part of an output will do: after its first `context_width` tokens its contexts are
    those with which it was drawn. Few tokens, or tokens that the model was sure of, show little.

    The p-value holds for one text and one key. Who tries many keys must correct for it, and as one key has the same
    numbers in all texts, the rate of false alarms is to be measured on texts without a mark.

    Args:
        token_ids: of the text.
        config: with which it may have been generated; its algorithm, key, alpha, context_width and prf count.
        p_value_threshold: for `is_watermarked`, in (0, 1).
        deduplicate_contexts: a context counts once. Without it a text that repeats itself counts its chance too often.

    Raises:
        TacoValidationError: an argument is wrong.
    """
    if not isinstance(config, WatermarkConfig):
        config = WatermarkConfig.from_mapping(config)
    if not 0 < p_value_threshold < 1:
        raise TacoValidationError(f"p_value_threshold must be between 0 and 1, got {p_value_threshold!r}.")
    ids = np.fromiter(token_ids, np.int64)
    if not len(ids):
        return WatermarkDetection(0.0, 1.0, 0, False)
    padded = np.concatenate((np.full(config.width, PADDING_TOKEN), ids))
    contexts = np.lib.stride_tricks.sliding_window_view(padded, config.width)[:-1]
    if deduplicate_contexts:
        _, first = np.unique(contexts, axis=0, return_index=True)
        first.sort()
        contexts, ids = contexts[first], ids[first]
    keys = config.key_words()
    weights = [1.0] if len(keys) == 1 else [1 - config.alpha, config.alpha]
    total = 0.0
    for key, weight in zip(keys, weights, strict=True):
        words = token_words(ids >> 2, context_words(contexts, np.tile(key, (len(ids), 1))))
        own = np.choose(ids & 3, words)
        total += weight * float(-np.log1p(-uniforms(own)).sum())
    # By chance each score has an exponential distribution with mean 1. The weighted sum is taken for a gamma
    # distribution with its mean and variance, which for one key it is.
    variance = sum(weight**2 for weight in weights)
    p_value = gamma_survival(len(ids) / variance, total / variance)
    return WatermarkDetection(total, p_value, len(ids), p_value <= p_value_threshold)


def gamma_survival(shape: float, value: float) -> float:
    """Probability that a gamma variable with this shape and scale 1 exceeds `value`: the regularised upper incomplete
    gamma function, by its series below the mean and by its continued fraction (Lentz's method) above."""
    if value <= 0:
        return 1.0
    scale = math.exp(shape * math.log(value) - value - math.lgamma(shape))
    if value < shape + 1:
        term = total = 1 / shape
        index = shape
        while term > total * 1e-17:
            index += 1
            term *= value / index
            total += term
        return max(0.0, 1 - total * scale)
    tiny = 1e-300
    denominator = value + 1 - shape
    c, d = 1 / tiny, 1 / denominator
    fraction = d
    step = 0.0
    index = 0.0
    while abs(step - 1) > 1e-15 and index < 1e6:
        index += 1
        factor = -index * (index - shape)
        denominator += 2
        d = 1 / (factor * d + denominator or tiny)
        c = denominator + factor / c or tiny
        step = c * d
        fraction *= step
    return min(1.0, fraction * scale)


class GumbelWatermarkDetector:
    """vLLM's class for `detect` with algorithm "gumbel".

    Args:
        key, context_width, prf: see `WatermarkConfig`.
        p_value_threshold, deduplicate_contexts: see `detect`.
    """

    def __init__(
        self,
        key: int,
        context_width: int = 4,
        p_value_threshold: float = 0.01,
        prf: Literal["philox"] = "philox",
        deduplicate_contexts: bool = True,
    ) -> None:
        self.config = WatermarkConfig(key=key, context_width=context_width, prf=prf)
        self.p_value_threshold = p_value_threshold
        self.deduplicate_contexts = deduplicate_contexts

    def detect(self, token_ids: Iterable[int]) -> WatermarkDetection:
        """As `taco.watermark.detect`."""
        return detect(
            token_ids,
            self.config,
            p_value_threshold=self.p_value_threshold,
            deduplicate_contexts=self.deduplicate_contexts,
        )


class DualKeyGumbelWatermarkDetector(GumbelWatermarkDetector):
    """As `GumbelWatermarkDetector`, for "dual_key_gumbel".

    Args:
        alpha: see `WatermarkConfig`.
    """

    def __init__(
        self,
        key: int,
        context_width: int = 4,
        p_value_threshold: float = 0.01,
        prf: Literal["philox"] = "philox",
        deduplicate_contexts: bool = True,
        alpha: float = 0.1,
    ) -> None:
        super().__init__(key, context_width, p_value_threshold, prf, deduplicate_contexts)
        self.config = WatermarkConfig(
            key=key, algorithm="dual_key_gumbel", alpha=alpha, context_width=context_width, prf=prf
        )
