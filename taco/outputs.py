"""What the engine returns for a request. Both vLLM 0.6's and vLLM 0.33's names work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from taco.deferred import HasDeferred
from taco.errors import EngineError, TacoError, TacoValidationError, refused
from taco.inputs import TokensPrompt, parse_prompt
from taco.logprobs import FlatLogprobs, LogprobsOnePosition, PromptLogprobs, SampleLogprobs

if TYPE_CHECKING:
    import numpy as np
    import torch

    from taco.lora_request import LoRARequest

T = TypeVar("T")


@dataclass
class SamplingMask:
    """The tokens that could be drawn at each position (vLLM 0.33); no output of this version has one.

    Args:
        token_ids: for each generated token, the ids that filters left.
    """

    token_ids: list[Any]


@dataclass
class WeightVersionSpan:
    """Which generated tokens came from one version of the weights (vLLM 0.33); no output of this version has one.

    Args:
        version: the name of the weights.
        start: index of the first of the tokens.
        end: index after the last.
    """

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class RequestError:
    """Why a request has failed (vLLM 0.33), for programs that make such objects.

    `error` of an output, and the exceptions of taco, hold texts instead.

    Args:
        code: kind of the error; "validation" for what the caller can correct.
        message: what was wrong.
        retryable: whether the same request may succeed later.
    """

    code: str
    message: str
    retryable: bool = False

    def to_exception(self) -> TacoError:
        """A TacoValidationError for the code "validation", an EngineError for others."""
        return TacoValidationError(self.message) if self.code == "validation" else EngineError(self.message)


@dataclass(repr=False)
class CompletionOutput(HasDeferred, deferrable="logprobs"):
    """One completion of a prompt.

    Args:
        index: position among the request's completions.
        text: the generated text, without what ended it.
        token_ids: the generated tokens, with the one that ended the sequence.
        cumulative_logprob: sum of the log-probabilities of the generated tokens; None if none were asked for.
        logprobs: log-probabilities for each generated token; None if none were asked for.
        finish_reason: "stop": an end-of-sequence token, a stop token or a stop text; "length": `max_tokens` reached
            or the context full, also for a prompt that is too long; "abort": aborted by the caller; "error": the
            row could not be run, see `RequestOutput.error`; "repetition": ended by `repetition_detection`;
            None: not finished.
        stop_reason: the stop text or the stop token's id; "repetition_detected"; None for the tokenizer's
            end-of-sequence token and everything else.
        lora_request: the adapter used.
        routed_experts: expert indices of each token, if they were asked for.
        sampling_mask: tokens that could be drawn at each position, if they were asked for.
        spec_decode_metrics: counts of speculative decoding.
        weight_versions: which weights produced which tokens, if weights were exchanged meanwhile.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: SampleLogprobs | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None
    routed_experts: np.ndarray | None = None
    sampling_mask: SamplingMask | None = None
    spec_decode_metrics: Any = None
    weight_versions: list[WeightVersionSpan] | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, text={self.text!r}, token_ids={self.token_ids}, "
            f"cumulative_logprob={self.cumulative_logprob}, logprobs={self.logprobs}, "
            f"finish_reason={self.finish_reason}, stop_reason={self.stop_reason})"
        )


@dataclass
class RequestMetrics:
    """When things happened to a request; times in seconds since the epoch, durations in seconds.

    The `*_ts` properties are 0.33's names, on the same clock; they are 0.0 for what has not happened.

    Args:
        arrival_time: the request entered the engine.
        last_token_time: its latest token came.
        first_scheduled_time: it first had a part in a step.
        first_token_time: its first token came.
        time_in_queue: from arrival to the first step.
        finished_time: it finished.
        scheduler_time, model_forward_time, model_execute_time: always None: a step serves many requests at once.
        num_generation_tokens: tokens generated.
        num_preemptions: how often it lost its place to another request.
        is_corrupted: always False.
        is_watermarked, is_watermark_skipped: whether its text was marked, or was to be and could not.
    """

    arrival_time: float
    last_token_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    time_in_queue: float | None
    finished_time: float | None = None
    scheduler_time: float | None = None
    model_forward_time: float | None = None
    model_execute_time: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    is_corrupted: bool = False
    is_watermarked: bool = False
    is_watermark_skipped: bool = False

    @property
    def queued_ts(self) -> float:
        return self.arrival_time

    @property
    def scheduled_ts(self) -> float:
        return self.first_scheduled_time or 0.0

    @property
    def first_token_ts(self) -> float:
        return self.first_token_time or 0.0

    @property
    def last_token_ts(self) -> float:
        return self.last_token_time

    @property
    def first_token_latency(self) -> float:
        """From arrival to the first token."""
        return 0.0 if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass
class RequestStateStats:
    """What vLLM 0.33 knows of a request's times, for programs that make such objects.

    `RequestOutput.metrics` is a `RequestMetrics`, which has every one of these attributes.

    Args:
        num_generation_tokens: tokens generated.
        num_preemptions: how often it lost its place to another request.
        arrival_time: when it entered the engine, in seconds since the epoch.
        queued_ts, scheduled_ts, first_token_ts, last_token_ts: when it was queued, first had a part in a step, and had
            its first and its latest token, in seconds.
        first_token_latency: seconds from arrival to the first token.
        is_corrupted: always False.
        is_watermarked, is_watermark_skipped: whether its text was marked, or was to be and could not.
    """

    num_generation_tokens: int = 0
    num_preemptions: int = 0
    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    is_corrupted: bool = False
    is_watermarked: bool = False
    is_watermark_skipped: bool = False


class RequestOutput(HasDeferred, deferrable="prompt_logprobs"):
    """What has become of one request.

    Args:
        request_id: the id of the request, as text.
        prompt: the prompt's text; None for a prompt given as token ids.
        prompt_token_ids: the prompt's tokens.
        prompt_logprobs: log-probabilities for each prompt token, the first None; None if none were asked for.
        outputs: the completions, by index.
        finished: whether all completions are finished.
        metrics: when things happened.
        lora_request: the adapter used.
        encoder_prompt: text of the encoder's prompt, for encoder-decoder models.
        encoder_prompt_token_ids: its tokens.
        num_cached_tokens: prompt tokens found in the prefix cache.
        num_cache_creation_tokens: always None.
        multi_modal_placeholders: where media stand in the prompt, by modality; None counts as {}.
        prompt_token_id_logprobs: float array [num_rows, num_ids], the log-probabilities that
            `SamplingParams.prompt_logprob_token_ids` asked for.
        kv_transfer_params: for another engine that takes over the KV cache.
        ec_transfer_params: the same for the encoder's cache.
        error: why the request could not be run, if `on_error="return"` was asked for and its finish_reason is "error".
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int] | None,
        prompt_logprobs: PromptLogprobs | None,
        outputs: list[CompletionOutput],
        finished: bool,
        metrics: RequestMetrics | None = None,
        lora_request: LoRARequest | None = None,
        encoder_prompt: str | None = None,
        encoder_prompt_token_ids: list[int] | None = None,
        num_cached_tokens: int | None = None,
        num_cache_creation_tokens: int | None = None,
        *,
        multi_modal_placeholders: dict[str, Any] | None = None,
        prompt_token_id_logprobs: np.ndarray | None = None,
        kv_transfer_params: dict[str, Any] | None = None,
        ec_transfer_params: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.prompt_logprobs = prompt_logprobs
        self.outputs = outputs
        self.finished = finished
        self.metrics = metrics
        self.lora_request = lora_request
        self.encoder_prompt = encoder_prompt
        self.encoder_prompt_token_ids = encoder_prompt_token_ids
        self.num_cached_tokens = num_cached_tokens
        self.num_cache_creation_tokens = num_cache_creation_tokens
        self.multi_modal_placeholders = multi_modal_placeholders or {}
        self.prompt_token_id_logprobs = prompt_token_id_logprobs
        self.kv_transfer_params = kv_transfer_params
        self.ec_transfer_params = ec_transfer_params
        self.error = error

    @classmethod
    def new(
        cls,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int] | None,
        text: str,
        token_ids: list[int],
        finished: bool = False,
    ) -> RequestOutput:
        """An output with one completion."""
        completion = CompletionOutput(0, text, token_ids, cumulative_logprob=None, logprobs=None)
        return cls(request_id, prompt, prompt_token_ids, None, [completion], finished)

    @classmethod
    @refused
    def from_seq_group(cls, seq_group: object, use_cache: bool, seq_id_to_seq_group: object) -> None:
        """There are no sequence groups; the engine makes outputs of what has become of its requests."""

    def add(self, next_output: RequestOutput, aggregate: bool) -> None:
        """Merges the following output of the same request into this one.

        Completions are matched by index; one that is new here is taken over. With `aggregate`, which deltas need, text,
        tokens and log-probabilities are appended; without it, the following completion replaces the earlier one. Either
        way the state (finished, metrics, error, sum of log-probabilities, ...) is the following output's.
        """
        self.finished |= next_output.finished
        for name in ("metrics", "kv_transfer_params", "ec_transfer_params", "error"):
            value = getattr(next_output, name)
            if value is not None:
                setattr(self, name, value)
        positions = {completion.index: position for position, completion in enumerate(self.outputs)}
        for following in next_output.outputs:
            position = positions.get(following.index)
            if position is None:
                self.outputs.append(following)
            elif aggregate:
                _append_delta(self.outputs[position], following)
            else:
                self.outputs[position] = following

    def __repr__(self) -> str:
        error = "" if self.error is None else f", error={self.error!r}"
        return (
            f"RequestOutput(request_id={self.request_id}, prompt={self.prompt!r}, "
            f"prompt_token_ids={self.prompt_token_ids}, encoder_prompt={self.encoder_prompt!r}, "
            f"encoder_prompt_token_ids={self.encoder_prompt_token_ids}, prompt_logprobs={self.prompt_logprobs}, "
            f"outputs={self.outputs}, finished={self.finished}, metrics={self.metrics}, "
            f"lora_request={self.lora_request}, num_cached_tokens={self.num_cached_tokens}, "
            f"multi_modal_placeholders={self.multi_modal_placeholders}{error})"
        )


def _append_delta(completion: CompletionOutput, delta: CompletionOutput) -> None:
    completion.text += delta.text
    completion.token_ids.extend(delta.token_ids)
    if delta.logprobs:
        if completion.logprobs is None:
            completion.logprobs = FlatLogprobs() if isinstance(delta.logprobs, FlatLogprobs) else []
        completion.logprobs.extend(delta.logprobs)
    # The sum covers the whole sequence in a delta too.
    if delta.cumulative_logprob is not None:
        completion.cumulative_logprob = delta.cumulative_logprob
    completion.finish_reason = delta.finish_reason
    completion.stop_reason = delta.stop_reason


@dataclass
class BeamSearchSequence:
    """One sequence found by beam search.

    Args:
        tokens: the prompt and the generated tokens, the end-of-sequence token included.
        logprobs: for each generated token, the candidates of its step.
        cum_logprob: sum of the log-probabilities of the generated tokens.
        text: the text of `tokens`.
        finish_reason: None, or "abort".
        stop_reason: always None.
        multi_modal_data: media of the prompt.
        mm_processor_kwargs: arguments of the media processor.
        orig_prompt: the prompt as it was given.
        lora_request: the adapter used.
    """

    tokens: list[int]
    logprobs: list[LogprobsOnePosition]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    multi_modal_data: Any = None
    mm_processor_kwargs: dict[str, Any] | None = None
    orig_prompt: Any = None
    lora_request: LoRARequest | None = None

    def __post_init__(self) -> None:
        value: object = self.cum_logprob
        if not isinstance(value, Real):
            raise TacoValidationError(
                f"cum_logprob must be a number, but is of type {type(value).__name__}. (vLLM 0.33 has another order of "
                "arguments; pass them by name.)",
                parameter="cum_logprob",
                value=value,
            )

    def get_prompt(self) -> TokensPrompt:
        """The sequence as a prompt, to go on from; with the `cache_salt` of the original one."""
        prompt = TokensPrompt(prompt_token_ids=list(self.tokens))
        if isinstance(self.orig_prompt, Mapping) and self.orig_prompt.get("cache_salt") is not None:
            prompt["cache_salt"] = self.orig_prompt["cache_salt"]
        return prompt


class BeamSearchInstance:
    """The state of a beam search over one prompt, for programs that search by themselves.

    Args:
        prompt_tokens: the prompt as token ids; or else:
        prompt: token ids, or a dict with `prompt_token_ids`.
        lora_request: the adapter to use.
        logprobs: what is known of the tokens of the first sequence.
        priority: of the requests to be made.
        kwargs: further fields of the first `BeamSearchSequence`.

    Attributes:
        beams: sequences to go on with; at first the prompt alone.
        completed: sequences that have ended.

    Raises:
        TacoValidationError: there is no prompt, or it is not given as token ids.
    """

    def __init__(
        self,
        prompt_tokens: Any = None,
        lora_request: LoRARequest | None = None,
        logprobs: list[LogprobsOnePosition] | None = None,
        priority: int = 0,
        *,
        prompt: Any = None,
        **kwargs: Any,
    ) -> None:
        if (prompt_tokens is None) == (prompt is None):
            raise TacoValidationError("Give either prompt_tokens or prompt.", parameter="prompt")
        given = prompt_tokens if prompt is None else prompt
        tokens = parse_prompt(given).token_ids
        if tokens is None:
            raise TacoValidationError("The prompt must be token ids; tokenize the text.", parameter="prompt")
        self.priority = priority
        self.beams = [
            BeamSearchSequence(tokens, list(logprobs or ()), orig_prompt=given, lora_request=lora_request, **kwargs)
        ]
        self.completed: list[BeamSearchSequence] = []


@dataclass
class BeamSearchOutput:
    """The sequences found for one prompt, best first."""

    sequences: list[BeamSearchSequence]


# Pooling models


@dataclass(repr=False, eq=False)
class PoolingOutput:
    """What a pooling model made of a prompt.

    Args:
        data: float32 on the CPU: [num_dimensions] for embeddings, [num_classes] for classes, [num_tokens, ...] where
            each token has its own.
    """

    data: torch.Tensor

    @property
    def embedding(self) -> list[float]:
        """`data` as a list; deprecated, use `data`, or `LLM.embed`."""
        warnings.warn("PoolingOutput.embedding is deprecated; use its data.", DeprecationWarning, stacklevel=2)
        numbers: list[float] = self.data.tolist()
        return numbers

    def __repr__(self) -> str:
        return f"PoolingOutput(data={self.data})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PoolingOutput)
            and self.data.shape == other.data.shape
            and bool((self.data == other.data).all())
        )


class PoolingRequestOutput(Generic[T]):
    """What has become of one request to a pooling model.

    Args:
        request_id: the id of the request, as text.
        outputs: the result; None for a request with an `error`.
        prompt_token_ids: the prompt's tokens.
        finished: always True.
        num_cached_tokens: prompt tokens found in the prefix cache. vLLM 0.33 has it before `finished`; positional
            arguments in that order are recognised by their types.
        error: why the request could not be run, if `on_error="return"` was asked for.
        late_chunking: always None.
    """

    def __init__(
        self,
        request_id: str,
        outputs: T,
        prompt_token_ids: list[int],
        finished: bool,
        num_cached_tokens: int | None = None,
        *,
        error: str | None = None,
        late_chunking: None = None,
    ) -> None:
        if isinstance(num_cached_tokens, bool):
            finished, num_cached_tokens = num_cached_tokens, finished
        self.request_id = request_id
        self.outputs = outputs
        self.prompt_token_ids = prompt_token_ids
        self.finished = finished
        self.num_cached_tokens = num_cached_tokens
        self.error = error
        self.late_chunking = late_chunking

    @classmethod
    @refused
    def from_seq_group(cls, seq_group: object) -> None:
        """There are no sequence groups; the engine makes outputs of what has become of its requests."""

    def __repr__(self) -> str:
        error = "" if self.error is None else f", error={self.error!r}"
        return (
            f"{type(self).__name__}(request_id={self.request_id!r}, outputs={self.outputs!r}, "
            f"prompt_token_ids={self.prompt_token_ids}, num_cached_tokens={self.num_cached_tokens}, "
            f"finished={self.finished}{error})"
        )


def _wrapped(output_type: Any, request_output_type: Any, base: PoolingRequestOutput[PoolingOutput]) -> Any:
    return request_output_type(
        base.request_id,
        None if base.error is not None else output_type.from_base(base.outputs),
        base.prompt_token_ids,
        base.finished,
        base.num_cached_tokens,
        error=base.error,
    )


def _require_dimensions(data: torch.Tensor, num_dimensions: int, what: str) -> torch.Tensor:
    if data.ndim != num_dimensions:
        raise TacoValidationError(f"pooled_data should be a {what}, but it has the shape {tuple(data.shape)}.")
    return data


@dataclass(repr=False)
class EmbeddingOutput:
    """The embedding of a prompt: a list of floats."""

    embedding: list[float]

    @staticmethod
    def from_base(pooling_output: PoolingOutput) -> EmbeddingOutput:
        """Raises TacoValidationError if the data are not one vector."""
        return EmbeddingOutput(_require_dimensions(pooling_output.data, 1, "1-D embedding vector").tolist())

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)

    def __repr__(self) -> str:
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """What `LLM.embed` returns for a prompt; see `PoolingRequestOutput`."""

    @staticmethod
    def from_base(request_output: PoolingRequestOutput[PoolingOutput]) -> EmbeddingRequestOutput:
        output: EmbeddingRequestOutput = _wrapped(EmbeddingOutput, EmbeddingRequestOutput, request_output)
        return output


@dataclass(repr=False)
class ClassificationOutput:
    """The probabilities of the classes of a prompt."""

    probs: list[float]

    @staticmethod
    def from_base(pooling_output: PoolingOutput) -> ClassificationOutput:
        """Raises TacoValidationError if the data are not one vector."""
        return ClassificationOutput(_require_dimensions(pooling_output.data, 1, "1-D probability vector").tolist())

    @property
    def num_classes(self) -> int:
        return len(self.probs)

    def __repr__(self) -> str:
        return f"ClassificationOutput(num_classes={self.num_classes})"


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """What `LLM.classify` returns for a prompt; see `PoolingRequestOutput`."""

    @staticmethod
    def from_base(request_output: PoolingRequestOutput[PoolingOutput]) -> ClassificationRequestOutput:
        kind = ClassificationRequestOutput
        output: ClassificationRequestOutput = _wrapped(ClassificationOutput, kind, request_output)
        return output


@dataclass(repr=False)
class ScoringOutput:
    """How well two texts go together."""

    score: float

    @staticmethod
    def from_base(pooling_output: PoolingOutput) -> ScoringOutput:
        """Raises TacoValidationError if the data are not a single number."""
        return ScoringOutput(float(_require_dimensions(pooling_output.data.squeeze(), 0, "scalar score")))

    @property
    def embedding(self) -> list[float]:
        """The score in a list; deprecated, use `score`."""
        warnings.warn("ScoringOutput.embedding is deprecated; use its score.", DeprecationWarning, stacklevel=2)
        return [self.score]

    def __repr__(self) -> str:
        return f"ScoringOutput(score={self.score})"


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """What `LLM.score` returns for a pair; see `PoolingRequestOutput`."""

    @staticmethod
    def from_base(request_output: PoolingRequestOutput[PoolingOutput]) -> ScoringRequestOutput:
        output: ScoringRequestOutput = _wrapped(ScoringOutput, ScoringRequestOutput, request_output)
        return output
