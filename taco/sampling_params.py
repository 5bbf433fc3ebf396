"""Parameters of one generation request: `SamplingParams`, `BeamSearchParams` and what they contain.

Field names, defaults and validation rules are the union of those of vLLM 0.6 and vLLM 0.33, plus the beam search fields
and `no_repeat_ngram_size` of TACO-LLM.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from taco.constraint_params import GuidedDecodingParams as GuidedDecodingParams  # vLLM has both of them here
from taco.constraint_params import StructuredOutputsParams as StructuredOutputsParams
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.param_checks import (
    ParameterTypeError,
    as_bool,
    as_int,
    as_logit_bias,
    as_number,
    as_processors,
    as_score_ids,
    as_strings,
    as_token_ids,
    check_extra_ints,
    require,
    require_in_vocabulary,
    suggests_names,
    type_error,
)
from taco.struct_fields import WithStructFields

if TYPE_CHECKING:
    from taco.config import ModelConfig, TacoConfig
    from taco.guided.spec import GrammarSpec
    from taco.reasoning import ReasoningMarkers

MAX_N_SEQUENCES = 16384  # largest n, best_of and beam width
MAX_LOGPROB_TOKEN_IDS = 128
GREEDY_TEMPERATURE = 1e-5  # sampling with a temperature below this is greedy
MIN_TEMPERATURE = 1e-2  # smaller positive temperatures overflow float32 logits, so they are raised to this


class RequestOutputKind(Enum):
    """What the outputs of an unfinished request contain."""

    CUMULATIVE = 0  # everything generated so far
    DELTA = 1  # what is new since the last output
    FINAL_ONLY = 2  # no outputs before the request has finished


class SamplingType(IntEnum):
    """How tokens are drawn."""

    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2


@dataclass
class RepetitionDetectionParams:
    """Ends a sequence whose last tokens are one pattern repeated again and again.

    Args:
        max_pattern_size: longest pattern looked for, in tokens; 0 = off.
        min_pattern_size: shortest pattern looked for, in tokens; 0 counts as 1.
        min_count: repetitions that end the sequence, at least 2.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            value = as_int(name, getattr(self, name))
            require(value >= 0, name, value, "must be at least 0")
            setattr(self, name, value)
        require(
            self.min_pattern_size <= self.max_pattern_size,
            "min_pattern_size",
            self.min_pattern_size,
            f"must be at most max_pattern_size={self.max_pattern_size}",
        )
        if self.max_pattern_size > 0:
            require(self.min_count >= 2, "min_count", self.min_count, "must be at least 2 (max_pattern_size=0 is off)")


@suggests_names
@dataclass(repr=False)
class SamplingParams(WithStructFields):
    """How the completions of one prompt are generated. Use keywords: positional orders differ between versions.

    Wrong values raise `TacoValidationError` (a ValueError), wrong types `ParameterTypeError` (also a TypeError).
    Numpy scalars count as Python numbers. Attributes may be assigned afterwards; `normalise` then checks them again.

    How many:
        n: completions returned for the prompt, 1 to 16384. Default 1.
        best_of: completions generated, of which the best `n` by log-probability are returned; >= n. With
            `use_beam_search`, the beam width. Default None = n. If given, construction moves the requested `n` to
            `_real_n` and sets `n = best_of`, so `n` is always the number of sequences that run.
        seed: key of the random numbers, in [-2**63, 2**64). None and -1: the engine's seed. Default None.

    Distribution:
        temperature: divides the logits; finite, >= 0. 0 = greedy (which switches top_p, top_k and min_p off and
            needs n = 1); positive values below 0.01 are raised to 0.01 with a warning. Default 1.0.
        top_p: smallest set of most likely tokens with this total probability, (0, 1]. Default 1.0 = off.
        top_k: only the k most likely tokens; 0 and -1 = off. Default -1.
        min_p: drop tokens less likely than min_p times the most likely one, [0, 1]. Default 0.0 = off.
        presence_penalty: subtracted once from the logit of each token generated so far, [-2, 2]. Default 0.0.
        frequency_penalty: subtracted for each occurrence of a token generated so far, [-2, 2]. Default 0.0.
        repetition_penalty: logits of tokens of prompt and output are divided (if positive) or multiplied (if not) by
            this; finite, > 0. Default 1.0 = off.
        no_repeat_ngram_size: no n-gram of this size occurs twice, >= 0. Default 0 = off.
        logit_bias: {token id: added to its logit, clamped to [-100, 100]}; ids from JSON, which are texts, become ints.
            Default None.
        allowed_token_ids: only these tokens, not empty. Default None = all.
        bad_words: texts that are not generated; strings, none empty. Default None (kept as []).
        logits_processors: callables `(output_token_ids, logits) -> logits`, or with the prompt's ids as a first of
            three arguments, applied in order to the row of logits before everything else. One with a method `clone` is
            cloned for each sequence. Default None.
        guided_decoding: `GuidedDecodingParams`. Default None.
        structured_outputs: `StructuredOutputsParams`; not together with guided_decoding. Default None.
        watermarking: marks the generated text as the engine's `watermark_config` says (see `taco.watermark`): None and
            True mark it, False does not. Greedy sampling, beam search and traces cannot be marked: then, and for True
            without a `watermark_config`, the text comes without a mark, with a warning and with
            `RequestOutput.metrics.is_watermark_skipped`. Default None.

    End:
        max_tokens: most tokens generated, >= 1; None = what fits into the context. Default 16.
        min_tokens: tokens generated before any stop condition counts, 0 to max_tokens. Default 0.
        stop: text or texts that end the sequence and are cut off; none empty; needs detokenize. Default None (kept
            as []).
        stop_token_ids: tokens that end the sequence. Default None (kept as []).
        include_stop_str_in_output: keep the stop text. Default False.
        ignore_eos: the model's end-of-sequence tokens do not end the sequence. Default False.
        repetition_detection: `RepetitionDetectionParams`; ends degenerate repetition. Default None = off.
        thinking_token_budget: most tokens of a reasoning section, >= 0; None and -1 = no limit. They count from the
            last mark that opens one, in prompt or output; then the mark that closes it follows, whatever other
            parameters say. The marks are those of the engine's `reasoning_config` or `reasoning_parser`. Default None.

    Log-probabilities:
        logprobs: most likely alternatives returned for each generated token, besides the token itself, >= 0; -1 = the
            whole vocabulary; True = 1; None and False = no log-probabilities. Default None.
        prompt_logprobs: the same for the tokens of the prompt. Default None.
        logprob_token_ids: log-probabilities of exactly these tokens, at most 128; if logprobs is given too it must be
            their number. Default None.
        prompt_logprob_token_ids: integers [num_rows, num_ids] (or lists, which are padded), kept as int64: row i names
            the tokens to score in the place of prompt token prompt_logprob_start + i + 1; -1 pads a row. There are
            len(prompt) - 1 - prompt_logprob_start rows. The result is `RequestOutput.prompt_token_id_logprobs`: the
            model's own log-probabilities, whatever temperature and filters are. Default None.
        prompt_logprob_start: prompt token before the first that is scored, >= 0; only what stands before it may come
            from the prefix cache. Needs prompt_logprob_token_ids, and does not shorten prompt_logprobs. Default
            None = 0.
        flat_logprobs: return `FlatLogprobs` in place of lists of dicts. Default False.

    Text and outputs:
        detokenize: produce text. Default True.
        skip_special_tokens: leave special tokens out of the text. Default True.
        spaces_between_special_tokens: put spaces between special tokens that are shown; without effect for tokenizers
            that never have any there, as all fast ones. Default True.
        truncate_prompt_tokens: keep only the last k tokens of the prompt, >= 1. Default None = all.
        output_kind: `RequestOutputKind` of outputs before the end. Default CUMULATIVE.
        stream_interval: tokens between two such outputs, >= 1. Default None = the engine's.

    Beam search inside sampling (TACO-LLM):
        use_beam_search: search for the likeliest sequences, instead of drawing them; `best_of` (or n) > 1 is the beam
            width. Needs temperature 0, top_p 1, top_k and min_p off. There is one output, at the end. Default False.
        length_penalty: a sequence's score is its log-probability over its length to this power; 1.0 without beam
            search. Default 1.0.
        early_stopping: when to stop, once `best_of` sequences have ended. True: at once; False: when no unfinished one
            scores better than the worst of them; "never": when none can become better. False without beam search.
            Default False.

    Engine:
        skip_reading_prefix_cache: compute the prompt even where it is cached. Default None = where prompt
            log-probabilities need it.
        skip_clone: `clone` shares containers with this object. Default False.
        extra_args: arguments of the engine's custom logits processors, {str: JSON-like value}; nothing else reads them.
            Default None.
        routed_experts_prompt_start: first prompt token whose expert routing is returned, >= 0; without effect, as
            no routing is returned without enable_return_routed_experts. Default 0.
        trace_decode_token_ids: tokens to follow instead of sampled ones; log-probabilities are those of the model for
            them. Nothing but their end, max_tokens and the context ends the sequence: eos, stop, stop_token_ids and
            min_tokens do not count. Needs n = 1; not with bad_words, guided decoding, repetition_detection or
            thinking_token_budget. Default None.

    Kept by the engine, not meant to be given: `_real_n`, `output_text_buffer_length` (characters held back while a stop
    text may be in the making), `_all_stop_token_ids` (what `min_tokens` masks), `_eos_token_id`,
    `_bad_words_token_ids`, `_watermarking_skipped`, `_beam_search_params` (of `LLM.beam_search`), `_reasoning_markers`.
    """

    # vLLM 0.6, in its positional order
    n: int = 1
    best_of: int | None = None
    _real_n: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: list[Callable[..., Any]] | None = None
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    output_text_buffer_length: int = 0
    _all_stop_token_ids: set[int] = field(default_factory=set)
    guided_decoding: GuidedDecodingParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    # what vLLM 0.33 has besides
    watermarking: bool | None = None
    prompt_logprob_token_ids: np.ndarray | list[list[int]] | None = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    stream_interval: int | None = None
    skip_clone: bool = False
    _eos_token_id: int | None = None
    _watermarking_skipped: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    extra_args: dict[str, Any] | None = None
    _bad_words_token_ids: list[list[int]] | None = None
    _beam_search_params: BeamSearchParams | None = None
    _reasoning_markers: ReasoningMarkers | None = None
    _grammar: GrammarSpec | None = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    routed_experts_prompt_start: int = 0
    trace_decode_token_ids: list[int] | None = None
    # what TACO-LLM has besides
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        self._all_stop_token_ids = set(self._all_stop_token_ids)
        self.normalise()
        if 0 < self.temperature < MIN_TEMPERATURE:
            warnings.warn(
                f"temperature {self.temperature} is below {MIN_TEMPERATURE}, where logits overflow; it was raised to "
                f"{MIN_TEMPERATURE}. Use temperature=0 for greedy sampling.",
                stacklevel=3,
            )
            self.temperature = MIN_TEMPERATURE
        if self.temperature < GREEDY_TEMPERATURE and not self.use_beam_search:
            require(
                self.n == 1,
                "n",
                self.n,
                "must be 1 when using greedy sampling (best_of must be 1 too, all samples would be the same)",
            )
            self.top_p, self.top_k, self.min_p = 1.0, -1, 0.0

    def normalise(self) -> None:
        """Brings every field into its canonical form, in place, and checks it.

        Construction calls this; the engine calls it again on its copy, because fields may have been assigned since.
        What only construction does: raising a small temperature, and the resets and the check of greedy sampling.

        Raises:
            TacoValidationError: naming the field, its value and what is allowed.
        """
        self._normalise_types()
        self._check_ranges()
        if self.best_of is not None:
            if self.best_of < self.n:
                raise TacoValidationError(
                    f"best_of must be greater than or equal to n, got n={self.n} and best_of={self.best_of}.",
                    parameter="best_of",
                    value=self.best_of,
                )
            if self._real_n is None:
                self._real_n, self.n = self.n, self.best_of
        self._check_combinations()
        assert isinstance(self.stop, list) and isinstance(self.stop_token_ids, list)
        held_back = bool(self.stop) and not self.include_stop_str_in_output
        self.output_text_buffer_length = max(map(len, self.stop)) - 1 if held_back else 0
        self._all_stop_token_ids.update(self.stop_token_ids)

    def _normalise_types(self) -> None:
        values = self.__dict__
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(values[name], (bool, np.bool_)):
                values[name] = 1 if values[name] else None
        for name in _BOOL_FIELDS:
            if type(values[name]) is not bool:
                values[name] = as_bool(name, values[name])
        for name in _FLOAT_FIELDS:
            if type(values[name]) is not float:
                number = as_number(name, values[name])
                values[name] = values[name] if type(values[name]) is int else number
        for name in _INT_FIELDS:
            if type(values[name]) is not int:
                values[name] = as_int(name, values[name])
        for name in _OPTIONAL_INT_FIELDS:
            if values[name] is not None and type(values[name]) is not int:
                values[name] = as_int(name, values[name])
        for name in ("watermarking", "skip_reading_prefix_cache"):
            if values[name] is not None:
                values[name] = as_bool(name, values[name])
        for name in ("allowed_token_ids", "logprob_token_ids", "trace_decode_token_ids"):
            if values[name] is not None:
                values[name] = as_token_ids(name, values[name])
        for name, kind in _NESTED_FIELDS.items():
            if values[name] is not None and not isinstance(values[name], kind):
                raise type_error(name, f"a {kind.__name__}", values[name])
        if not isinstance(self.output_kind, RequestOutputKind):
            raise type_error("output_kind", "a RequestOutputKind", self.output_kind)
        if self.repetition_detection is not None:
            self.repetition_detection.__post_init__()  # attributes may have been assigned since

        if self.seed == -1:
            self.seed = None
        if self.thinking_token_budget == -1:
            self.thinking_token_budget = None
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        self.stop = [] if stop is None else as_strings("stop", stop)
        if self.stop_token_ids is None:
            self.stop_token_ids = []
        else:
            self.stop_token_ids = list(dict.fromkeys(as_token_ids("stop_token_ids", self.stop_token_ids)))
        self.bad_words = [] if self.bad_words is None else as_strings("bad_words", self.bad_words)
        if self.logits_processors is not None:
            self.logits_processors = as_processors(self.logits_processors)
        if self.logit_bias is not None:
            self.logit_bias = as_logit_bias(self.logit_bias)
        if self.prompt_logprob_token_ids is not None:
            self.prompt_logprob_token_ids = as_score_ids(self.prompt_logprob_token_ids)
        if self.extra_args is not None:
            if not isinstance(self.extra_args, dict):
                raise type_error("extra_args", "a dict", self.extra_args)
            check_extra_ints(self.extra_args)

    def _check_ranges(self) -> None:
        require(self.n >= 1, "n", self.n, "must be at least 1")
        require(self.n <= MAX_N_SEQUENCES, "n", self.n, f"must be at most {MAX_N_SEQUENCES}")
        require((self.best_of or 1) <= MAX_N_SEQUENCES, "best_of", self.best_of, f"must be at most {MAX_N_SEQUENCES}")
        # Chained comparisons are false for NaN, so it is refused too.
        require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "must be in [-2, 2]")
        require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "must be in [-2, 2]")
        require(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "must be a finite number greater than zero",
        )
        require(math.isfinite(self.temperature), "temperature", self.temperature, "must be a finite number")
        require(self.temperature >= 0, "temperature", self.temperature, "must be non-negative")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")
        require(self.top_k >= -1, "top_k", self.top_k, "must be 0 or -1 (disable), or at least 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "must be in [0, 1]")
        require(math.isfinite(self.length_penalty), "length_penalty", self.length_penalty, "must be a finite number")
        if self.seed is not None:
            require(-(2**63) <= self.seed < 2**64, "seed", self.seed, "must be in [-2**63, 2**64)")
        require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "must be greater than or equal to 0")
        require(self.min_tokens < 2**63, "min_tokens", self.min_tokens, "must be less than 2**63")
        for name, least in _LEAST_VALUES.items():
            value = getattr(self, name)
            require(value is None or value >= least, name, value, f"must be at least {least}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(value is None or value >= -1, name, value, "must be non-negative or -1 (= the full vocabulary)")
        if self.early_stopping is not True and self.early_stopping is not False:
            require(
                self.early_stopping == "never", "early_stopping", self.early_stopping, 'must be True, False or "never"'
            )
        if self.allowed_token_ids is not None:
            require(len(self.allowed_token_ids) > 0, "allowed_token_ids", [], "is not None and empty, so no token fits")
        if self.logprob_token_ids is not None:
            require(
                len(self.logprob_token_ids) <= MAX_LOGPROB_TOKEN_IDS,
                "logprob_token_ids",
                f"{len(self.logprob_token_ids)} ids",
                f"must have at most {MAX_LOGPROB_TOKEN_IDS} ids",
            )

    def _check_combinations(self) -> None:
        if self.max_tokens is not None:
            require(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                self.min_tokens,
                f"must be less than or equal to max_tokens={self.max_tokens}",
            )
        if self.stop and not self.detokenize:
            raise TacoValidationError(
                "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
                parameter="stop",
                value=self.stop,
            )
        if self.best_of is not None and self.best_of != self._real_n and self.output_kind is RequestOutputKind.DELTA:
            raise TacoValidationError(
                "best_of must equal n to use output_kind=DELTA: the best n are known only at the end.",
                parameter="best_of",
                value=self.best_of,
            )
        if self.guided_decoding is not None and self.structured_outputs is not None:
            raise TacoValidationError(
                "guided_decoding and structured_outputs are two names of one feature; give only one of them.",
                parameter="structured_outputs",
                value=self.structured_outputs,
            )
        if self.logprob_token_ids is not None and self.logprobs is not None:
            require(
                self.logprobs == len(self.logprob_token_ids),
                "logprobs",
                self.logprobs,
                f"must equal len(logprob_token_ids)={len(self.logprob_token_ids)} when both are set",
            )
        if self.prompt_logprob_start is not None and self.prompt_logprob_token_ids is None:
            raise TacoValidationError(
                "prompt_logprob_start requires prompt_logprob_token_ids.",
                parameter="prompt_logprob_start",
                value=self.prompt_logprob_start,
            )
        if self.trace_decode_token_ids is not None:
            require(len(self.trace_decode_token_ids) > 0, "trace_decode_token_ids", [], "must not be empty")
            with_trace = "with trace_decode_token_ids"
            require(self.n == 1, "n", self.n, f"must be 1 {with_trace}")
            for name in _NOT_WITH_TRACE:
                value = getattr(self, name)
                require(value is None or value == [], name, value, f"cannot be used {with_trace}")
        if self.use_beam_search:
            with_beams = "when using beam search"
            require(self.n > 1, "best_of", self.n, f"must be greater than 1 {with_beams}")
            require(self.temperature == 0, "temperature", self.temperature, f"must be 0 {with_beams}")
            require(self.top_p == 1, "top_p", self.top_p, f"must be 1 {with_beams}")
            require(self.top_k in (-1, 0), "top_k", self.top_k, f"must be -1 {with_beams}")
            require(self.min_p == 0, "min_p", self.min_p, f"must be 0 {with_beams}")
        else:
            without = "when not using beam search (use_beam_search=True)"
            require(self.early_stopping is False, "early_stopping", self.early_stopping, f"must be False {without}")
            require(self.length_penalty == 1, "length_penalty", self.length_penalty, f"must be 1.0 {without}")

    def validate_supported(self) -> None:
        """Raises UnsupportedFeatureError if a field asks for something that this version of taco cannot do."""
        if self.use_beam_search:
            for name in _NOT_WITH_BEAM_SEARCH:
                if getattr(self, name) is not None:
                    self._refuse(name, "it in beam search (use_beam_search)")

    def _refuse(self, name: str, feature: str) -> None:
        raise UnsupportedFeatureError(
            f"{name} is not supported: this version of taco does not have {feature}. Leave {name} at its default.",
            parameter=name,
            value=getattr(self, name),
        )

    def follow_trace(self) -> None:
        """Lets `trace_decode_token_ids` alone decide when the sequence ends, in place; use it on a copy."""
        assert self.trace_decode_token_ids is not None
        length = len(self.trace_decode_token_ids)
        self.max_tokens = length if self.max_tokens is None else min(length, self.max_tokens)
        self.min_tokens = 0
        self.ignore_eos = True
        self.stop, self.stop_token_ids = [], []
        self._all_stop_token_ids = set()
        self.output_text_buffer_length = 0

    @staticmethod
    def for_sampler_warmup() -> SamplingParams:
        """Parameters that use most parts of the sampler at once; token ids are below 4."""
        return SamplingParams(
            temperature=0.8,
            top_p=0.95,
            top_k=40,
            min_p=0.01,
            presence_penalty=0.1,
            frequency_penalty=0.1,
            repetition_penalty=1.1,
            min_tokens=1,
            logprobs=2,
            prompt_logprobs=1,
            logit_bias={0: 1.0, 1: -1.0},
            _bad_words_token_ids=[[2], [0, 3]],
        )

    @staticmethod
    def from_optional(*args: Any, **fields: Any) -> SamplingParams:
        """Makes parameters from values that may be missing or come from JSON.

        As the constructor, but None stands for the default of n, temperature, top_p, top_k, min_p and the penalties.
        """
        if args:
            given = _FROM_OPTIONAL.bind_partial(*args).arguments
            if twice := given.keys() & fields:
                raise ParameterTypeError(f"from_optional() got multiple values for {sorted(twice)}.")
            fields = given | fields
        for name in _NONE_IS_DEFAULT:
            if name in fields and fields[name] is None:
                del fields[name]
        return SamplingParams(**fields)

    def update_from_generation_config(
        self,
        generation_config: dict[str, Any],
        model_eos_token_id: int | None = None,
        *,
        eos_token_id: int | None = None,
    ) -> None:
        """Enters the model's end-of-sequence tokens, in place; use it on a clone of the caller's object.

        `model_eos_token_id`, the tokenizer's, becomes `eos_token_id`: it ends the sequence with `stop_reason` None. The
        others in `generation_config["eos_token_id"]` (an int or a list) become stop token ids, which are reported as
        `stop_reason`. With `ignore_eos` none of them ends the sequence, but `min_tokens` masks them all.
        `eos_token_id` is another name of `model_eos_token_id`.
        """
        if model_eos_token_id is None:
            model_eos_token_id = eos_token_id
        elif eos_token_id is not None:
            raise TacoValidationError(
                "model_eos_token_id and eos_token_id are two names of one parameter; give only one of them.",
                parameter="eos_token_id",
                value=eos_token_id,
            )
        eos_ids = generation_config.get("eos_token_id")
        if eos_ids is None:
            eos_ids = []
        elif isinstance(eos_ids, int):
            eos_ids = [eos_ids]
        secondary = [token_id for token_id in eos_ids if token_id != model_eos_token_id]
        self._all_stop_token_ids.update(secondary)
        if model_eos_token_id is not None:
            self._all_stop_token_ids.add(model_eos_token_id)
        if self.ignore_eos:
            self._eos_token_id = None
        else:
            self._eos_token_id = model_eos_token_id
            self.stop_token_ids = list(dict.fromkeys([*(self.stop_token_ids or ()), *secondary]))

    def update_from_tokenizer(self, tokenizer: Any) -> None:
        """Enters the token ids of `bad_words`, in place; use it on a clone of the caller's object.

        They are those of each word as the start of a text and, if as many but beginning differently, after a space.

        Args:
            tokenizer: a Hugging Face tokenizer; not used where there are no `bad_words`.

        Raises:
            TacoValidationError: a word has no tokens.
        """

        def encode(text: str) -> list[int]:
            options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
            try:
                ids: list[int] = tokenizer([text], add_special_tokens=False, **options)["input_ids"][0]
            except Exception as error:  # of a foreign tokenizer
                raise TacoValidationError(
                    f"The tokenizer failed on {text!r:.80} of bad_words: {type(error).__name__}: {error}",
                    parameter="bad_words",
                    value=text,
                ) from error
            return ids

        if not self.bad_words:
            return
        self._bad_words_token_ids = []
        for word in self.bad_words:
            word = word.lstrip()
            plain = encode(word) if word else []
            if not plain:
                raise TacoValidationError(
                    "bad_words contains a text that has no tokens; remove it.", parameter="bad_words", value=word
                )
            self._bad_words_token_ids.append(plain)
            after_space = encode(" " + word)
            if after_space[0] != plain[0] and len(after_space) == len(plain):
                self._bad_words_token_ids.append(after_space)

    def verify(
        self, model_config: ModelConfig, speculative_config: object, structured_outputs_config: object, tokenizer: Any
    ) -> None:
        """Checks the fields against a model, as the engine does for every request.

        Args:
            speculative_config: must be None; there is no speculative decoding.
            structured_outputs_config: without effect: what a constraint on the text contains is checked where it is
                compiled.
            tokenizer: of the model; None where prompts are token ids.

        Raises:
            UnsupportedFeatureError: a field asks for something that this version of taco cannot do.
            TacoValidationError: naming the field.
        """
        if speculative_config is not None:
            raise UnsupportedFeatureError(
                "speculative_config is not supported; leave it None.", parameter="speculative_config"
            )
        self.normalise()
        self.validate_supported()
        if tokenizer is None:
            self.check_needs_no_tokenizer()
        self.check_logprobs(model_config.max_logprobs, model_config.vocab_size)
        self.check_vocabulary(model_config.vocab_size)

    def check_needs_no_tokenizer(self) -> None:
        """Raises TacoValidationError if a field says something of the text, of which only tokens are known."""
        for name in ("stop", "bad_words", "guided_decoding", "structured_outputs"):
            if getattr(self, name):
                raise TacoValidationError(
                    f"{name} needs a tokenizer, but skip_tokenizer_init is True.",
                    parameter=name,
                    value=getattr(self, name),
                )

    def check_logprobs(self, max_logprobs: int, vocab_size: int) -> None:
        """Raises TacoValidationError if more log-probabilities are asked for than `max_logprobs`."""
        given = self.prompt_logprob_token_ids
        assert given is None or isinstance(given, np.ndarray)
        for name, what, asked in (
            ("logprobs", "sample logprobs", self.logprobs),
            ("prompt_logprobs", "prompt logprobs", self.prompt_logprobs),
            ("prompt_logprob_token_ids", "prompt_logprob_token_ids", None if given is None else given.shape[1]),
        ):
            if asked is None:
                continue
            number = vocab_size if asked == -1 else asked
            if number > max_logprobs:
                raise TacoValidationError(
                    f"Cannot request more than {max_logprobs} logprobs. Requested {what} of {number}, which is "
                    f"greater than max allowed: {max_logprobs}. Pass a larger max_logprobs to LLM.",
                    parameter=name,
                    value=asked,
                )

    def check_vocabulary(self, vocab_size: int, with_stop_token_ids: bool = True) -> None:
        """Raises TacoValidationError if a field has a token id that is not below `vocab_size`."""
        for name in _TOKEN_ID_FIELDS:
            value = getattr(self, name)
            if value and (with_stop_token_ids or name != "stop_token_ids"):
                require_in_vocabulary(name, value, vocab_size)
        if self.prompt_logprob_token_ids is not None:
            scored = np.unique(self.prompt_logprob_token_ids).tolist()
            scored = scored[1:] if scored[0] == -1 else scored
            require_in_vocabulary("prompt_logprob_token_ids", scored, vocab_size)

    @property
    def sampling_type(self) -> SamplingType:
        """Greedy, random with the engine's seed, or random with this request's."""
        if self.temperature < GREEDY_TEMPERATURE:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED

    @property
    def all_stop_token_ids(self) -> set[int]:
        """Every token that can end the sequence; masked while fewer than `min_tokens` are generated."""
        return self._all_stop_token_ids

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end of sequence; None before the engine has entered it, and with `ignore_eos`."""
        return self._eos_token_id

    @property
    def grammar(self) -> GrammarSpec | None:
        """The constraint on the text; None before the engine has entered it, and where there is none."""
        return self._grammar

    @property
    def reasoning_markers(self) -> ReasoningMarkers | None:
        """The marks of reasoning sections; None before the engine has entered them, and without a budget."""
        return self._reasoning_markers

    @property
    def bad_words_token_ids(self) -> list[list[int]] | None:
        """`bad_words` as token ids; None before the engine has entered them."""
        return self._bad_words_token_ids

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives returned for each generated token (-1: the whole vocabulary), or None if none are wanted."""
        if self.logprobs is not None:
            return self.logprobs
        return len(self.logprob_token_ids) if self.logprob_token_ids else None

    @property
    def first_scored_position(self) -> int | None:
        """First prompt position whose logits are needed, which score the token after it; None if none are."""
        if self.prompt_logprobs is not None:
            return 0
        return None if self.prompt_logprob_token_ids is None else self.prompt_logprob_start or 0

    def clone(self) -> SamplingParams:
        """A copy that can be changed freely.

        Lists, sets and dicts are copied one level deep (not at all with `skip_clone`); nested parameter objects are
        shared, and logits processors as in `with_own_logits_processors`.
        """
        new = copy.copy(self)
        if not self.skip_clone:
            for name in _CONTAINER_FIELDS:
                value = getattr(self, name)
                if value is not None:
                    setattr(new, name, copy.copy(value))
        return new.with_own_logits_processors()

    def with_own_logits_processors(self) -> SamplingParams:
        """These parameters for one more sequence.

        Logits processors that remember what they have seen have a method `clone`, which is called for each sequence;
        the others are shared. Returns this object if all are.
        """
        processors = self.logits_processors or []
        own = [processor.clone() if hasattr(processor, "clone") else processor for processor in processors]
        if all(one is other for one, other in zip(own, processors, strict=True)):
            return self
        new = copy.copy(self)
        new.logits_processors = own
        return new

    def __eq__(self, other: object) -> bool:
        # Written out because one field is an array, whose == is not a truth value.
        if type(other) is not type(self):
            return NotImplemented
        for name in self.__struct_fields__:
            ours, theirs = getattr(self, name), getattr(other, name)
            if isinstance(ours, np.ndarray) or isinstance(theirs, np.ndarray):
                if not np.array_equal(ours, theirs):
                    return False
            elif ours is not theirs and ours != theirs:
                return False
        return True

    def __repr__(self) -> str:
        shown = list(_REPR_FIELDS)
        for name, default in _REPR_IF_CHANGED.items():
            value = getattr(self, name)
            if isinstance(value, np.ndarray) or value != default:
                shown.append(name)
        return f"SamplingParams({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


_BOOL_FIELDS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "flat_logprobs",
    "skip_clone",
    "use_beam_search",
)
_FLOAT_FIELDS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "min_p",
    "length_penalty",
)
_INT_FIELDS = ("n", "top_k", "min_tokens", "routed_experts_prompt_start", "no_repeat_ngram_size")
_OPTIONAL_INT_FIELDS = (
    "best_of",
    "_real_n",
    "seed",
    "max_tokens",
    "logprobs",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "prompt_logprob_start",
    "stream_interval",
    "thinking_token_budget",
)
_NESTED_FIELDS: dict[str, type] = {
    "guided_decoding": GuidedDecodingParams,
    "structured_outputs": StructuredOutputsParams,
    "repetition_detection": RepetitionDetectionParams,
}
_LEAST_VALUES = {
    "max_tokens": 1,
    "truncate_prompt_tokens": 1,
    "stream_interval": 1,
    "prompt_logprob_start": 0,
    "thinking_token_budget": 0,
    "routed_experts_prompt_start": 0,
    "no_repeat_ngram_size": 0,
}
_NOT_WITH_TRACE = (
    "bad_words",
    "guided_decoding",
    "structured_outputs",
    "repetition_detection",
    "thinking_token_budget",
)
_NONE_IS_DEFAULT = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_TOKEN_ID_FIELDS = (
    "logit_bias",
    "allowed_token_ids",
    "stop_token_ids",
    "logprob_token_ids",
    "trace_decode_token_ids",
)
_NOT_WITH_BEAM_SEARCH = ("logprob_token_ids", "repetition_detection")
_CONTAINER_FIELDS = (
    "stop",
    "stop_token_ids",
    "bad_words",
    "logits_processors",
    "_all_stop_token_ids",
    "logit_bias",
    "allowed_token_ids",
    "logprob_token_ids",
    "extra_args",
    "_bad_words_token_ids",
    "trace_decode_token_ids",
)
_REPR_FIELDS = (  # those that vLLM 0.6 shows, in its order
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "bad_words",
    "include_stop_str_in_output",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "guided_decoding",
)
_REPR_IF_CHANGED = {
    name: getattr(SamplingParams, name)
    for name in SamplingParams.__struct_fields__
    if not name.startswith("_") and name not in (*_REPR_FIELDS, "output_text_buffer_length")
}


def _from_optional_order() -> list[str]:
    names = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
    names.remove("output_text_buffer_length")
    names.remove("include_stop_str_in_output")
    names.insert(names.index("ignore_eos"), "include_stop_str_in_output")
    return names


# What `inspect` shows: the names, as client code filters its options by them, in the order of vLLM 0.6.
_FROM_OPTIONAL = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=getattr(SamplingParams, name))
        for name in _from_optional_order()
    ]
)
SamplingParams.from_optional.__signature__ = _FROM_OPTIONAL  # type: ignore[attr-defined]


@suggests_names
@dataclass
class BeamSearchParams(WithStructFields):
    """Parameters of `LLM.beam_search`.

    Args:
        beam_width: sequences kept at each step and returned, 1 to 16384.
        max_tokens: most tokens generated, >= 1.
        ignore_eos: sequences go on after the end-of-sequence token.
        temperature: divides the logits, >= 0; 0 counts as 1. Without effect where log-probabilities are those before
            it (`logprobs_mode`).
        length_penalty: a sequence's score is its log-probability over its length to this power. The length is that of
            prompt and output in vLLM 0.6, less an end-of-sequence token, and that of the output in 0.33.
        include_stop_str_in_output: without effect, as there are no stop texts.
        structured_outputs: constraint on the generated text.
        skip_special_tokens: leave special tokens out of the text; vLLM 0.6 never does.
        watermarking: without effect, as a search draws no tokens; True makes a warning.
        allowed_token_ids: only these tokens.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True
    watermarking: bool | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        self.beam_width = as_int("beam_width", self.beam_width)
        require(
            1 <= self.beam_width <= MAX_N_SEQUENCES,
            "beam_width",
            self.beam_width,
            f"must be at least 1 and at most {MAX_N_SEQUENCES}",
        )
        self.max_tokens = as_int("max_tokens", self.max_tokens)
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "must be at least 1")
        self.temperature = as_number("temperature", self.temperature)
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "must be finite and non-negative")
        self.length_penalty = as_number("length_penalty", self.length_penalty)
        require(math.isfinite(self.length_penalty), "length_penalty", self.length_penalty, "must be a finite number")
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = as_token_ids("allowed_token_ids", self.allowed_token_ids)

    def configure_logprobs(self, sampling_params: SamplingParams, config: TacoConfig) -> None:
        """Has parameters of a search ask for the tokens that it considers at each step, in place."""
        sampling_params.logprobs = min(2 * self.beam_width, config.model_config.vocab_size)
