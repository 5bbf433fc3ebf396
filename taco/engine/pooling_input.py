"""From what a caller passes to requests of pooling models: the counterpart of the input processor."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from taco.config import PoolerSettings, TacoConfig
from taco.engine.input_processor import (
    InputProcessor,
    ParamsCache,
    PreparedPrompt,
    ProcessedRequest,
    TokenizeOptions,
    _Params,
)
from taco.errors import TacoError, TacoValidationError
from taco.inputs import ParsedPrompt, TacoPromptTypeError, parse_prompt
from taco.outputs import PoolingRequestOutput
from taco.param_checks import ParameterTypeError
from taco.pooling_params import PoolingParams
from taco.request import Request
from taco.sampling_params import RequestOutputKind


@dataclass(frozen=True)
class TextPair:
    """A prompt of two texts, for models that compare them."""

    text: str
    text_pair: str


class PoolingInputProcessor(InputProcessor):
    """Makes requests from prompts and `PoolingParams`.

    Texts are truncated by the tokenizer, which leaves the special tokens around them in place, and on the side that is
    the tokenizer's own unless the caller names one.
    """

    def __init__(self, config: TacoConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        settings = config.model_config.pooler_config
        assert settings is not None
        self._settings: PoolerSettings = settings
        self._max_total_tokens = self._max_model_len + 1  # the result counts as one
        self._knows_token_types = getattr(config.model_config.hf_text_config, "type_vocab_size", 0) > 1

    def default_params(self) -> Any:
        """Parameters of a caller who gives none."""
        return PoolingParams()

    # Prompts

    def tokenize_options(
        self, tokenization_kwargs: Mapping[str, Any] | None, add_special_tokens: bool = True
    ) -> TokenizeOptions:
        """As `InputProcessor.tokenize_options`, but `truncation_side` is by default that of the tokenizer."""
        given = {key: value for key, value in (tokenization_kwargs or {}).items() if value is not None}
        side = getattr(self.tokenizer, "truncation_side", "right")
        return super().tokenize_options({"truncation_side": side, **given}, add_special_tokens)

    def _parse(self, prompt: object) -> ParsedPrompt:
        if isinstance(prompt, TextPair):
            parsed = super()._parse(prompt.text)
            parsed.text_pair = super()._parse(prompt.text_pair).text
            return parsed
        if isinstance(prompt, Mapping) and prompt.get("token_type_ids") is not None:
            parsed = parse_prompt({key: value for key, value in prompt.items() if key != "token_type_ids"})
            parsed.token_type_ids = self._check_token_types(prompt["token_type_ids"], parsed.token_ids)
            return parsed
        return super()._parse(prompt)

    def _check_token_types(self, types: object, token_ids: list[int] | None) -> list[int]:
        if token_ids is None:
            raise TacoPromptTypeError("token_type_ids goes with prompt_token_ids.", parameter="token_type_ids")
        if not self._knows_token_types:
            raise TacoValidationError("This model has no token types; drop token_type_ids.", parameter="token_type_ids")
        checked = parse_prompt(types).token_ids
        num_types = self.config.model_config.hf_text_config.type_vocab_size
        if checked is None or len(checked) != len(token_ids) or not all(0 <= t < num_types for t in checked):
            raise TacoValidationError(
                f"token_type_ids must be a list of {len(token_ids)} integers below {num_types}, one for each token.",
                parameter="token_type_ids",
                value=types,
            )
        return checked

    def _tokenize(
        self, prompts: Sequence[ParsedPrompt | TacoValidationError], options: TokenizeOptions
    ) -> list[list[int] | TacoValidationError]:
        rows: list[list[int] | TacoValidationError | None] = [None] * len(prompts)
        singles: list[int] = []
        pairs: list[int] = []
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, TacoValidationError):
                rows[index] = prompt
            elif prompt.token_ids is not None:
                if options.max_tokens is not None:
                    part = slice(-options.max_tokens, None) if options.keep_end else slice(options.max_tokens)
                    prompt.token_ids = prompt.token_ids[part]
                    prompt.token_type_ids = prompt.token_type_ids and prompt.token_type_ids[part]
                rows[index] = prompt.token_ids
            else:
                (singles if prompt.text_pair is None else pairs).append(index)
        for indexes in (singles, pairs):
            self._tokenize_texts(indexes, cast(Sequence[ParsedPrompt], prompts), options, rows)
        return [self._within(row, options.max_length) for row in rows]

    def _tokenize_texts(
        self,
        indexes: list[int],
        prompts: Sequence[ParsedPrompt],
        options: TokenizeOptions,
        rows: list[list[int] | TacoValidationError | None],
    ) -> None:
        """Fills in the rows of some prompts, which are all texts or all pairs of texts."""
        if not indexes:
            return
        try:
            encoded = self._run_tokenizer([prompts[index] for index in indexes], options)
        except Exception as error:  # of a foreign tokenizer; one at a time shows which text it is
            if len(indexes) > 1:
                for index in indexes:
                    self._tokenize_texts([index], prompts, options, rows)
                return
            message = f"The tokenizer failed on this prompt: {type(error).__name__}: {error}"
            rows[indexes[0]] = TacoValidationError(message, parameter="prompt")
            return
        types = encoded.get("token_type_ids")
        for place, index in enumerate(indexes):
            rows[index] = encoded["input_ids"][place]
            if types is not None:
                prompts[index].token_type_ids = types[place]

    def _run_tokenizer(self, prompts: Sequence[ParsedPrompt], options: TokenizeOptions) -> Any:
        lower = str.lower if self._settings.lower_case else str
        texts = [lower(cast(str, prompt.text)) for prompt in prompts]
        pairs = None
        if prompts[0].text_pair is not None:
            pairs = [lower(cast(str, prompt.text_pair)) for prompt in prompts]
        arguments: dict[str, Any] = {}
        if options.max_tokens is not None:
            arguments = {"truncation": True, "max_length": options.max_tokens}
        side = getattr(self.tokenizer, "truncation_side", "right")
        self.tokenizer.truncation_side = "left" if options.keep_end else "right"
        try:
            return self.tokenizer(
                texts,
                pairs,
                add_special_tokens=options.add_special_tokens,
                return_attention_mask=False,
                # The tokenizer knows whether its model was trained with them.
                return_token_type_ids=None if pairs is not None and self._knows_token_types else False,
                verbose=False,
                **arguments,
            )
        finally:
            self.tokenizer.truncation_side = side

    @staticmethod
    def _within(row: list[int] | TacoValidationError | None, max_length: int | None) -> list[int] | TacoValidationError:
        assert row is not None
        if max_length is None or isinstance(row, TacoValidationError) or len(row) <= max_length:
            return row
        return TacoValidationError(
            f"The prompt has {len(row)} tokens, more than max_length={max_length}; shorten it, or pass truncation=True "
            "in tokenization_kwargs.",
            parameter="max_length",
            value=max_length,
        )

    # Checks of a row

    def _checked_ids(self, token_ids: list[int], params: Any) -> list[int]:
        self._check_token_ids(token_ids)
        if len(token_ids) > self._max_model_len:
            raise TacoValidationError(
                f"This model's maximum context length is {self._max_model_len} tokens. However, your prompt contains "
                f"{len(token_ids)} input tokens. Shorten it, or pass truncate_prompt_tokens=-1 (to an engine: "
                "tokenization_kwargs={'truncate_prompt_tokens': -1}).",
                parameter="prompt",
                value=len(token_ids),
            )
        return token_ids

    # Parameters

    def normalise_params(self, params: object, output_kind: RequestOutputKind | None) -> _Params:
        """Checks parameters against the model, and fills in a copy of them; the caller's are not changed.

        Raises:
            TacoValidationError: naming the field.
        """
        if not isinstance(params, PoolingParams):
            raise ParameterTypeError(
                f"pooling_params must be a PoolingParams, but is of type {type(params).__name__}.",
                parameter="pooling_params",
                value=params,
            )
        params = params.clone()
        params.verify(self.config.model_config)
        # What is made of all tokens, or of the first, must see them computed: the cache has their keys only.
        if self._accumulates(cast(str, params.task)):
            params.skip_reading_prefix_cache = True
        unused = cast(Any, params)
        return _Params(unused, frozenset(), 1, False, unused)

    def _accumulates(self, task: str) -> bool:
        return task.startswith("token_") or self._settings.seq_pooling_type != "LAST"

    # Requests

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
        normalised = cache.get(self, params, output_kind).params
        prompt_token_ids = prepared.token_ids.tolist()
        types = prepared.token_type_ids
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            params=normalised,
            max_total_tokens=len(prompt_token_ids) + 1,  # the result counts as one
            priority=priority,
            arrival_time=time.time() if arrival_time is None else arrival_time,
            cache_salt=prepared.cache_salt,
            token_type_ids=None if types is None else types.tolist(),
            accumulates=self._accumulates(cast(Any, normalised).task),
        )
        return ProcessedRequest(request_id, prepared.text, prompt_token_ids, normalised, lora_request, [request])

    def error_output(self, request_id: str, prompt: object, error: TacoError | str) -> Any:
        """The output of a row that could not be run: without a result, and with `error`."""
        return PoolingRequestOutput(request_id, None, [], True, error=str(error))
