"""From what a caller passes to `Request` objects: parses, tokenizes and validates.

A prompt takes two steps, so that a large batch can be checked as a whole before any of it runs: `prepare_batch` leaves
token ids in a compact form, `build` makes the requests when the engine has room for them. `process` does both.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
import warnings
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from taco.config import TacoConfig
from taco.engine.beam_search import BeamOptions
from taco.engine.parallel_sampling import child_ids, child_seeds, without_prompt_logprobs
from taco.errors import TacoError, TacoValidationError, UnsupportedFeatureError
from taco.guided.compiler import GrammarCompiler
from taco.guided.protocol import GrammarError
from taco.guided.request import to_spec
from taco.inputs import ParsedPrompt, parse_prompt
from taco.outputs import CompletionOutput, RequestMetrics, RequestOutput
from taco.param_checks import NUM_SHOWN, ParameterTypeError, require_in_vocabulary
from taco.pooling_params import PoolingParams
from taco.random_keys import row_seed
from taco.reasoning import ReasoningMarkers, reasoning_markers
from taco.request import Request
from taco.sampling_params import RequestOutputKind, SamplingParams, SamplingType

logger = logging.getLogger(__name__)

_MAX_CACHED_PARAMS = 4096


@dataclass(slots=True)
class ProcessedRequest:
    """One request as the caller sees it, and the sequences that run for it.

    Args:
        request_id: the caller's.
        prompt: text to echo.
        prompt_token_ids: the prompt.
        params: normalised private copy of the caller's parameters.
        lora_request: to echo.
        children: one request a sequence: `n`, or `best_of`; for beam search the first beam.
        finished: the output, if there is nothing to run.
        num_returned: completions to return, at most as many as there are children.
        hides_logprobs: log-probabilities are computed to choose the best samples, but the caller did not ask for them.
        beam_options: how to search; None samples.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    lora_request: object = None
    children: list[Request] = field(default_factory=list)
    finished: RequestOutput | None = None
    num_returned: int = 1
    hides_logprobs: bool = False
    beam_options: BeamOptions | None = None


@dataclass(slots=True)
class PreparedPrompt:
    """A tokenized and validated prompt that has no request yet.

    Args:
        number: number of the request in the life of the processor.
        text: text to echo.
        token_ids: the prompt, four bytes a token.
        cache_salt: separates its prefix-cache entries from those of other salts.
        token_type_ids: which of two texts each token belongs to; None for the first.
    """

    number: int
    text: str | None
    token_ids: array[int]
    cache_salt: str | None = None
    token_type_ids: array[int] | None = None


@dataclass(slots=True)
class _Params:
    """Normalised parameters, shared by all rows of a batch that came with the same object."""

    params: SamplingParams
    stop_token_ids: frozenset[int]
    num_returned: int
    hides_logprobs: bool
    sibling_params: SamplingParams  # for the samples after the first
    beam_options: BeamOptions | None = None
    for_max_tokens: dict[int, SamplingParams] = field(default_factory=dict)  # where max_tokens was left open


class ParamsCache:
    """Normalises each distinct `SamplingParams` object of a batch once; the objects must not change meanwhile."""

    def __init__(self) -> None:
        # The key is the address, so the value keeps the object alive.
        self._entries: dict[int, tuple[object, _Params | TacoValidationError]] = {}

    def get(self, processor: InputProcessor, params: object, output_kind: RequestOutputKind | None) -> _Params:
        """Raises TacoValidationError if the parameters are wrong, for every row that has them."""
        entry = self._entries.get(id(params))
        if entry is None:
            normalised: _Params | TacoValidationError
            try:
                normalised = processor.normalise_params(params, output_kind)
            except TacoValidationError as error:
                normalised = without_frames(error)
            if len(self._entries) >= _MAX_CACHED_PARAMS:  # a batch with an object a row
                self._entries.clear()
            entry = self._entries[id(params)] = (params, normalised)
        if isinstance(entry[1], TacoValidationError):
            raise entry[1].with_traceback(None)
        return entry[1]


@dataclass(frozen=True)
class TokenizeOptions:
    """`tokenization_kwargs`, checked.

    Args:
        add_special_tokens: let the tokenizer add its start (and end) tokens to a text.
        max_tokens: truncate to this many tokens; None does not truncate.
        keep_end: truncation drops tokens at the start (side "left") and not at the end.
        max_length: longer prompts are errors.
    """

    add_special_tokens: bool = True
    max_tokens: int | None = None
    keep_end: bool = True
    max_length: int | None = None


class InputProcessor:
    """Makes requests from prompts and parameters.

    Args:
        config: of the engine.
        tokenizer: a Hugging Face tokenizer; None where prompts are token ids only.
        grammars: check the constraints of guided decoding; None leaves that to others.
    """

    def __init__(self, config: TacoConfig, tokenizer: Any, grammars: GrammarCompiler | None = None) -> None:
        model = config.model_config
        self.config = config
        self._grammars = grammars
        self._behaviour = config.behaviour
        self._vocab_size = model.vocab_size
        self._max_model_len = model.max_model_len
        # A sequence may be one token longer where the reference looks at the length after it has drawn a token.
        self._max_total_tokens = model.max_model_len + self._behaviour.length_cap_extra_token
        self._numbers = itertools.count()
        self._warned_unmarked: set[str] = set()
        self.set_tokenizer(tokenizer)

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Replaces the tokenizer; requests go on being numbered, so that no row repeats another's random numbers."""
        self.tokenizer = tokenizer
        self._bos_token_id: int | None = getattr(tokenizer, "bos_token_id", None)
        self._bos_token: str | None = getattr(tokenizer, "bos_token", None)
        eos_token_id: int | None = getattr(tokenizer, "eos_token_id", None)
        self._eos_token_id = eos_token_id if eos_token_id is not None and eos_token_id < self._vocab_size else None
        self._warned_of_bos = False
        self._reasoning_markers: ReasoningMarkers | None = None  # made when they are first needed

    def default_params(self) -> SamplingParams:
        """Parameters of a caller who gives none: the defaults, or those of the model's generation_config.json."""
        return SamplingParams.from_optional(**self.config.model_config.default_sampling_params)

    # Whole requests

    def process(
        self,
        request_id: str,
        prompt: object,
        params: SamplingParams | PoolingParams | None,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
        lora_request: object = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> ProcessedRequest:
        """Makes one request.

        Args:
            request_id: names it in outputs; must not be in use by an unfinished request.
            prompt: see `taco.inputs.parse_prompt`.
            params: not changed; None for the defaults.
            arrival_time: seconds since the epoch; now if None.
            priority: smaller runs earlier under the "priority" policy.
            lora_request: must be None in this version.
            tokenization_kwargs: see `tokenize_options`.

        Raises:
            TacoValidationError: prompt or parameters are wrong.
        """
        cache = ParamsCache()
        if params is None:
            params = self.default_params()
        [row] = self.prepare_batch(
            [prompt],
            [params],
            cache,
            self.tokenize_options(tokenization_kwargs),
            priorities=[priority],
            lora_requests=[lora_request],
        )
        if isinstance(row, TacoValidationError):
            raise row
        return self.build(
            request_id,
            row,
            params,
            cache,
            priority=priority,
            lora_request=lora_request,
            arrival_time=arrival_time,
        )

    def prepare_batch(
        self,
        prompts: Sequence[object],
        params: Sequence[object],
        cache: ParamsCache,
        options: TokenizeOptions,
        *,
        priorities: Sequence[object],
        lora_requests: Sequence[object],
        output_kind: RequestOutputKind | None = None,
        first_row: int = 0,
    ) -> list[PreparedPrompt | TacoValidationError]:
        """Tokenizes prompts together and checks each row with its parameters; all sequences have one element a row.

        A prompt may be an error already: it stays one. An error's row gets a number too, so that the random numbers of
        the other rows do not depend on it.

        Args:
            first_row: index of the first prompt in the caller's batch, for messages; the rest as for `process`.
        """
        rows: list[PreparedPrompt | TacoValidationError] = []
        parsed: list[ParsedPrompt | TacoValidationError] = []
        for prompt in prompts:
            try:
                if isinstance(prompt, TacoValidationError):
                    raise prompt
                parsed.append(self._parse(prompt))
            except TacoValidationError as error:
                parsed.append(without_frames(error))
        token_ids = self._tokenize(parsed, options)
        overlong: list[tuple[int, int]] = []  # row, number of tokens
        for index, prompt in enumerate(parsed):
            number = next(self._numbers)
            try:
                ids = token_ids[index]
                if isinstance(ids, TacoValidationError):
                    raise ids
                assert isinstance(prompt, ParsedPrompt)
                normalised = cache.get(self, params[index], output_kind)
                self._check_priority(priorities[index])
                _check_lora(lora_requests[index])
                ids = self._checked_ids(ids, normalised.params)
                if len(ids) >= self._max_total_tokens:
                    overlong.append((first_row + index, len(ids)))
                echo = prompt.prompt_text_echo
                if prompt.text is None and not self._behaviour.echo_text_of_token_prompts:
                    echo = None
                types = None if prompt.token_type_ids is None else array("b", prompt.token_type_ids)
                rows.append(PreparedPrompt(number, echo, array("i", ids), prompt.cache_salt, types))
            except TacoValidationError as error:
                rows.append(without_frames(error))
        if overlong:
            shown = ", ".join(str(row) for row, _ in overlong[:NUM_SHOWN])
            more = f", ... ({len(overlong)} in all)" if len(overlong) > NUM_SHOWN else ""
            logger.warning(
                "Input prompt (%d tokens) is too long and exceeds limit of %d; its output is empty, with "
                'finish_reason="length".%s',
                overlong[0][1],
                self._max_model_len,
                f" Such rows: {shown}{more}." if first_row + len(prompts) > 1 else "",
            )
        return rows

    def build(
        self,
        request_id: str,
        prepared: PreparedPrompt,
        params: object,
        cache: ParamsCache,
        *,
        priority: int = 0,
        lora_request: object = None,
        arrival_time: float | None = None,
        output_kind: RequestOutputKind | None = None,
    ) -> ProcessedRequest:
        """Makes the request of a row that `prepare_batch` found valid with the same parameters."""
        normalised = cache.get(self, params, output_kind)
        prompt_token_ids = prepared.token_ids.tolist()
        arrival_time = time.time() if arrival_time is None else arrival_time
        processed = ProcessedRequest(
            request_id,
            prepared.text,
            prompt_token_ids,
            normalised.params,
            lora_request,
            num_returned=normalised.num_returned,
            hides_logprobs=normalised.hides_logprobs,
            beam_options=normalised.beam_options,
        )
        num_prompt_tokens = len(prompt_token_ids)
        if num_prompt_tokens >= self._max_total_tokens:
            processed.finished = _overlong_output(processed, arrival_time)
            return processed
        first, others = normalised.params, normalised.sibling_params
        if first.max_tokens is None:
            room = self._max_total_tokens - num_prompt_tokens
            first = _with_max_tokens(normalised, room)
            others = without_prompt_logprobs(first)
        assert first.max_tokens is not None
        seed = first.seed if first.seed is not None else row_seed(self.config.model_config.seed, prepared.number)
        beam_options = normalised.beam_options
        num_samples = 1 if beam_options is not None else first.n
        ids_and_seeds = zip(child_ids(request_id, num_samples), child_seeds(seed, num_samples), strict=True)
        processed.params = first
        processed.children = [
            Request(
                request_id=child_id,
                prompt_token_ids=prompt_token_ids,
                params=(first if index == 0 else others).with_own_logits_processors(),
                max_total_tokens=min(num_prompt_tokens + first.max_tokens, self._max_total_tokens),
                eos_token_id=first.eos_token_id,
                stop_token_ids=normalised.stop_token_ids,
                seed=child_seed,
                priority=priority,
                arrival_time=arrival_time,
                cache_salt=prepared.cache_salt,
                num_candidates=0 if beam_options is None else beam_options.num_candidates,
            )
            for index, (child_id, child_seed) in enumerate(ids_and_seeds)
        ]
        return processed

    def error_output(self, request_id: str, prompt: object, error: TacoError | str) -> RequestOutput:
        """See the function of this name."""
        return error_output(request_id, prompt, error)

    # Prompts

    def tokenize_options(
        self, tokenization_kwargs: Mapping[str, Any] | None, add_special_tokens: bool = True
    ) -> TokenizeOptions:
        """Checks `tokenization_kwargs`.

        Keys: `truncate_prompt_tokens` (keep k tokens; -1: as many as the model can take), `truncation_side` ("left",
        the default, drops tokens at the start), `max_length` (longer prompts are errors, or are truncated to it with
        `truncation=True`), `add_special_tokens`, `padding` (only False). Others are ignored with a warning.

        Raises:
            TacoValidationError: a value is wrong.
        """
        if not isinstance(tokenization_kwargs, Mapping | None):
            raise TacoValidationError(
                f"tokenization_kwargs must be a dict or None, but is of type {type(tokenization_kwargs).__name__}.",
                parameter="tokenization_kwargs",
                value=tokenization_kwargs,
            )
        given = {key: value for key, value in (tokenization_kwargs or {}).items() if value is not None}
        # The longest prompt that leaves room for a token.
        model_limit = self._max_total_tokens - 1

        def length(name: str, minimum: int) -> int | None:
            value = given.pop(name, None)
            if value is None:
                return None
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum or value == 0:
                wanted = "an integer of at least 1" + (", or -1 for the model's limit" if minimum < 0 else "")
                raise TacoValidationError(f"{name} must be {wanted}, got {value!r}.", parameter=name, value=value)
            return value if value > 0 else model_limit

        def choice(name: str, default: object, allowed: tuple[object, ...]) -> object:
            value = given.pop(name, default)
            if value not in allowed:
                raise TacoValidationError(
                    f"{name} must be one of {list(allowed)}, got {value!r}.", parameter=name, value=value
                )
            return value

        max_tokens = length("truncate_prompt_tokens", -1)
        max_length = length("max_length", 1)
        if choice("truncation", False, (True, False, "longest_first", "do_not_truncate")) in (True, "longest_first"):
            max_tokens = min(max_tokens or model_limit, max_length or model_limit)
            max_length = None
        keep_end = choice("truncation_side", "left", ("left", "right")) == "left"
        add_special_tokens = bool(choice("add_special_tokens", add_special_tokens, (True, False)))
        choice("padding", False, (False, "do_not_pad"))
        if given:
            warnings.warn(f"tokenization_kwargs {sorted(given)} are not known and are ignored.", stacklevel=3)
        return TokenizeOptions(add_special_tokens, max_tokens, keep_end, max_length)

    def _parse(self, prompt: object) -> ParsedPrompt:
        parsed = parse_prompt(prompt)
        if parsed.text is not None and self.tokenizer is None:
            raise TacoValidationError(
                "You cannot pass text prompts when `skip_tokenizer_init` is True; pass token ids.", parameter="prompt"
            )
        return parsed

    def _tokenize(
        self, prompts: Sequence[ParsedPrompt | TacoValidationError], options: TokenizeOptions
    ) -> list[list[int] | TacoValidationError]:
        """Token ids of each prompt, truncated as the options say; errors stay where they are."""
        texts = [prompt.text for prompt in prompts if isinstance(prompt, ParsedPrompt) and prompt.text is not None]
        encoded = iter(self._encode(texts, options.add_special_tokens))
        rows: list[list[int] | TacoValidationError] = []
        for prompt in prompts:
            if isinstance(prompt, TacoValidationError):
                rows.append(prompt)
                continue
            row = next(encoded) if prompt.token_ids is None else prompt.token_ids
            if not isinstance(row, TacoValidationError):
                if options.max_tokens is not None:
                    row = row[-options.max_tokens :] if options.keep_end else row[: options.max_tokens]
                if options.max_length is not None and len(row) > options.max_length:
                    row = TacoValidationError(
                        f"The prompt has {len(row)} tokens, more than max_length={options.max_length}; shorten it, or "
                        "pass truncation=True in tokenization_kwargs.",
                        parameter="max_length",
                        value=options.max_length,
                    )
            rows.append(row)
        return rows

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int] | TacoValidationError]:
        if not texts:
            return []
        rows: list[list[int] | TacoValidationError] = []
        try:
            rows += self._call_tokenizer(texts, add_special_tokens)
        except Exception:  # of a foreign tokenizer; one at a time shows which text it is
            for text in texts:
                try:
                    rows += self._call_tokenizer([text], add_special_tokens)
                except Exception as error:
                    message = f"The tokenizer failed on this prompt: {type(error).__name__}: {error}"
                    rows.append(TacoValidationError(message, parameter="prompt"))
        if add_special_tokens:
            self._drop_second_bos(texts, rows)
        return rows

    def _drop_second_bos(self, texts: list[str], rows: list[list[int] | TacoValidationError]) -> None:
        bos = self._bos_token_id
        if bos is None or not self._bos_token:
            return
        doubled = {
            index: row
            for index, row in enumerate(rows)
            if isinstance(row, list) and row[:2] == [bos, bos] and texts[index].startswith(self._bos_token)
        }
        # Where the tokenizer adds none, the text says it twice and means it.
        if doubled and self._call_tokenizer(["a"], True)[0][:1] == [bos]:
            for index, row in doubled.items():
                rows[index] = row[1:]
            self._warn_of_bos()

    def _call_tokenizer(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return ids

    def _warn_of_bos(self) -> None:
        if not self._warned_of_bos:
            self._warned_of_bos = True
            logger.warning(
                "A prompt begins with %s, which the tokenizer adds itself; the second one was left out. Remove it from "
                "your texts; or, if they have all special tokens, as rendered chat templates do, pass "
                "tokenization_kwargs={'add_special_tokens': False}, or the messages to LLM.chat. This is said once.",
                self._bos_token,
            )

    # Checks of a row

    def _checked_ids(self, token_ids: list[int], params: SamplingParams) -> list[int]:
        """The tokens of a prompt, truncated as the parameters say; too many only where that makes an empty output."""
        if params.truncate_prompt_tokens is not None:
            token_ids = token_ids[-params.truncate_prompt_tokens :]
        self._check_token_ids(token_ids)
        _check_scored_rows(len(token_ids), params)
        self._check_length(len(token_ids), params)
        return token_ids

    def _check_token_ids(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise TacoValidationError(
                "Prompt cannot be empty (the decoder prompt cannot be empty): it has no tokens.", parameter="prompt"
            )
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            bad = [(i, token) for i, token in enumerate(token_ids) if not 0 <= token < self._vocab_size]
            shown = ", ".join(f"{token} at position {i}" for i, token in bad[:NUM_SHOWN])
            more = f" and {len(bad) - NUM_SHOWN} more" if len(bad) > NUM_SHOWN else ""
            raise TacoValidationError(
                f"Token id {bad[0][1]} is out of vocabulary: ids must be in [0, {self._vocab_size}), but there is "
                f"{shown}{more}.",
                parameter="prompt_token_ids",
                value=bad[0][1],
            )

    def _check_length(self, num_tokens: int, params: SamplingParams) -> None:
        room = self._max_total_tokens - num_tokens
        limit = self._max_model_len
        if room < 1:
            if self._behaviour.overlong_prompt == "length_result":
                return
            message = f"This model's maximum context length is {limit} tokens. However, your prompt contains "
            if num_tokens == limit:
                message += (
                    f"{num_tokens} input tokens, which plus the number of requested output tokens (at least 1) is "
                    f"longer than the maximum model length of {limit}."
                )
            else:
                message += f"{num_tokens} input tokens."
            raise TacoValidationError(
                message + " Shorten it, or truncate it with tokenization_kwargs={'truncate_prompt_tokens': -1}.",
                parameter="prompt",
                value=num_tokens,
            )
        is_open = params.max_tokens is None and self._behaviour.checks_min_tokens_against_context
        if is_open and params.min_tokens > room:
            raise TacoValidationError(
                f"min_tokens must be less than or equal to max_tokens={room} (what the context of {limit} tokens "
                f"leaves to this prompt), got {params.min_tokens}.",
                parameter="min_tokens",
                value=params.min_tokens,
            )

    def _check_priority(self, priority: object) -> None:
        if isinstance(priority, bool) or not isinstance(priority, Integral):
            raise ParameterTypeError(
                f"priority must be an int, but is of type {type(priority).__name__}.",
                parameter="priority",
                value=priority,
            )
        policy = self.config.scheduler_config.policy
        if priority != 0 and policy != "priority" and self._behaviour.priority_needs_policy:
            raise TacoValidationError(
                f"Got priority {priority} but Priority scheduling is not enabled. Pass scheduling_policy='priority' to "
                "LLM.",
                parameter="priority",
                value=priority,
            )

    # Sampling parameters

    def normalise_params(self, params: object, output_kind: RequestOutputKind | None) -> _Params:
        """Checks parameters against model and engine, and completes a copy of them; the caller's are not changed.

        Args:
            output_kind: instead of the parameters' own.

        Raises:
            TacoValidationError: naming the field.
        """
        if not isinstance(params, SamplingParams):
            raise ParameterTypeError(
                f"sampling_params must be a SamplingParams, but is of type {type(params).__name__}.",
                parameter="sampling_params",
                value=params,
            )
        params = copy.copy(params)
        params._all_stop_token_ids = set(params._all_stop_token_ids)  # the one container that is changed in place
        if output_kind is not None:
            params.output_kind = output_kind
        params.normalise()
        params.validate_supported()
        constraint = params.guided_decoding or params.structured_outputs
        params._grammar = to_spec(constraint, self.config.guided_decoding_config)
        if params.trace_decode_token_ids is not None:
            params.follow_trace()
        if self.tokenizer is None:
            params.check_needs_no_tokenizer()
            params.detokenize = False
        params.check_logprobs(self.config.model_config.max_logprobs, self._vocab_size)
        # Where they are not checked, a token that does not exist is never drawn.
        params.check_vocabulary(self._vocab_size, with_stop_token_ids=self._behaviour.checks_stop_token_ids)
        self._ask_logits_processors(params)
        params.update_from_tokenizer(self.tokenizer)
        for sequence in params.bad_words_token_ids or ():
            require_in_vocabulary("bad_words", sequence, self._vocab_size)
        params.update_from_generation_config(dict(self.config.model_config.generation_config), self._eos_token_id)
        params._all_stop_token_ids = {token for token in params._all_stop_token_ids if 0 <= token < self._vocab_size}
        self._check_grammar(params)
        num_returned = params.n if params._real_n is None else params._real_n
        logprobs_mode = self.config.model_config.logprobs_mode
        beam_options = self._beam_options(params, num_returned)
        if params.thinking_token_budget is not None or (params._grammar and self.config.guided_after_reasoning):
            params._reasoning_markers = self._markers_of_reasoning(params)
        self._resolve_watermarking(params, beam_options is not None)
        ranks = None
        if beam_options is not None:
            ranks = "Beam search ranks sequences"
        elif num_returned < params.n:
            ranks = f"best_of={params.n} ranks samples"
        if ranks is not None and not logprobs_mode.endswith("logprobs"):
            raise UnsupportedFeatureError(
                f"{ranks} by their log-probabilities, and with logprobs_mode={logprobs_mode!r} there are logits in "
                "their place; do without it, or pass another logprobs_mode to LLM.",
                parameter="logprobs_mode",
                value=logprobs_mode,
            )
        hides_logprobs = beam_options is None and num_returned < params.n and params.num_logprobs is None
        if hides_logprobs:
            params.logprobs = 0
        return _Params(
            params,
            frozenset(params.stop_token_ids or ()),
            num_returned,
            hides_logprobs,
            without_prompt_logprobs(params),
            beam_options,
        )

    def _check_grammar(self, params: SamplingParams) -> None:
        if params._grammar is None or self._grammars is None:
            return
        if not params.all_stop_token_ids:
            raise TacoValidationError(
                "Guided decoding ends a text with a stop token, and this model has no end-of-sequence token: pass "
                "stop_token_ids.",
                parameter="stop_token_ids",
            )
        try:
            self._grammars.check(params._grammar)
        except GrammarError as error:
            field = "structured_outputs" if params.guided_decoding is None else "guided_decoding"
            raise GrammarError(f"{field}.{params._grammar.kind.value}: {error.message}", parameter=field) from None

    def _ask_logits_processors(self, params: SamplingParams) -> None:
        for processor in self.config.model_config.logits_processors:
            try:
                processor.validate_params(params)
            except TacoValidationError:
                raise
            except ValueError as error:
                raise TacoValidationError(f"{processor.__name__}: {error}", parameter="extra_args") from error

    def _markers_of_reasoning(self, params: SamplingParams) -> ReasoningMarkers:
        def refuse(message: str, cls: type[TacoValidationError] = TacoValidationError) -> TacoValidationError:
            name = "thinking_token_budget"
            return cls(f"{name} {message}", parameter=name, value=params.thinking_token_budget)

        if self.config.reasoning_config is None:
            raise refuse(
                'needs the marks that enclose reasoning: pass reasoning_parser="qwen3" (or the name of another kind of '
                'model) or reasoning_config={"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"} to LLM.'
            )
        if self.tokenizer is None:
            raise refuse("needs a tokenizer, but skip_tokenizer_init is True.")
        if params._grammar is not None and not self.config.guided_after_reasoning:
            raise refuse(
                "cannot be used with guided decoding that constrains the text from its first token on: leave "
                "enable_in_reasoning of structured_outputs_config False.",
                UnsupportedFeatureError,
            )
        if self._reasoning_markers is None:
            self._reasoning_markers = reasoning_markers(self.config.reasoning_config, self.tokenizer, self._vocab_size)
        return self._reasoning_markers

    def _resolve_watermarking(self, params: SamplingParams, searches: bool) -> None:
        """Makes `watermarking` say whether the text is marked; warns once of each reason why it cannot be."""
        is_configured = self.config.watermark_config is not None
        wanted = is_configured if params.watermarking is None else params.watermarking
        reason = None
        if not is_configured:
            reason = "LLM has no watermark_config"
        elif params.trace_decode_token_ids is not None:
            reason = "the tokens of a trace are given"
        elif searches:
            reason = "beam search does not draw tokens"
        elif params.sampling_type is SamplingType.GREEDY:
            reason = "greedy sampling does not draw tokens; pass a temperature above 0"
        params.watermarking = wanted and reason is None
        params._watermarking_skipped = wanted and reason is not None
        if wanted and reason is not None and reason not in self._warned_unmarked:
            self._warned_unmarked.add(reason)
            logger.warning("A text comes without a watermark: %s. Further ones come without a warning.", reason)

    def _beam_options(self, params: SamplingParams, num_returned: int) -> BeamOptions | None:
        beam_params = params._beam_search_params
        if beam_params is None and not params.use_beam_search:
            return None
        width = params.n if beam_params is None else beam_params.beam_width
        num_logprobs = params.num_logprobs
        num_best = self._vocab_size if num_logprobs == -1 else num_logprobs or 0
        return BeamOptions(
            width=width,
            num_returned=num_returned if beam_params is None else width,
            length_penalty=params.length_penalty if beam_params is None else beam_params.length_penalty,
            score_includes_prompt=self._behaviour.beam_score_includes_prompt,
            # `LLM.beam_search` goes on to the last token; the result is the same once nothing can become better.
            early_stopping=params.early_stopping if beam_params is None else "never",  # type: ignore[arg-type]
            ends_anywhere=beam_params is not None,
            num_candidates=min(max(2 * width, num_best), self._vocab_size),
            keeps_candidates=num_logprobs is not None,
        )


def without_frames(error: TacoValidationError) -> TacoValidationError:
    """The error as a value: its traceback would keep the batch alive, in a cycle of references."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _with_max_tokens(normalised: _Params, max_tokens: int) -> SamplingParams:
    """The parameters with `max_tokens` filled in; one object for all rows with the same room."""
    params = normalised.for_max_tokens.get(max_tokens)
    if params is None:
        params = copy.copy(normalised.params)
        params.max_tokens = max_tokens
        normalised.for_max_tokens[max_tokens] = params
    return params


def _check_scored_rows(num_tokens: int, params: SamplingParams) -> None:
    if params.prompt_logprob_token_ids is None:
        return
    num_rows = len(params.prompt_logprob_token_ids)
    start = params.prompt_logprob_start or 0
    num_scored = max(0, num_tokens - 1 - start)
    if num_rows != num_scored:
        raise TacoValidationError(
            f"prompt_logprob_token_ids has {num_rows} rows, but the prompt has {num_scored} scored rows (prompt_len - "
            f"1 - prompt_logprob_start = {num_tokens} - 1 - {start}); give one row for each of them.",
            parameter="prompt_logprob_token_ids",
            value=num_rows,
        )


def _check_lora(lora_request: object) -> None:
    if lora_request is not None:
        raise UnsupportedFeatureError(
            f"Got lora_request {lora_request} but LoRA is not enabled! This version of taco does not have LoRA "
            "adapters; leave lora_request None.",
            parameter="lora_request",
            value=lora_request,
        )


def _overlong_output(processed: ProcessedRequest, arrival_time: float) -> RequestOutput:
    now = time.time()
    return RequestOutput(
        processed.request_id,
        processed.prompt,
        processed.prompt_token_ids,
        None,
        [CompletionOutput(i, "", [], None, None, finish_reason="length") for i in range(processed.num_returned)],
        True,
        RequestMetrics(arrival_time, now, None, None, None, now),
        num_cached_tokens=0,
    )


def error_output(request_id: str, prompt: object, error: TacoError | str) -> RequestOutput:
    """The output of a row that could not be run: one empty completion with finish_reason "error".

    Args:
        prompt: as the caller gave it; echoed if it is text.
        error: why.
    """
    now = time.time()
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return RequestOutput(
        request_id,
        text if isinstance(text, str) else None,
        [],
        None,
        [CompletionOutput(0, "", [], None, None, finish_reason="error")],
        True,
        RequestMetrics(now, now, None, None, None, now),
        num_cached_tokens=0,
        error=str(error),
    )
