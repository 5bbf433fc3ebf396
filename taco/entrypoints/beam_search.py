"""`LLM.beam_search`: the method, its parameters as the engine takes them, its outputs, its progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from taco.config import TacoConfig
from taco.engine.llm_engine import LLMEngine
from taco.entrypoints.progress import Progress, bar_class
from taco.errors import TacoValidationError
from taco.inputs import split_prompts
from taco.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from taco.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from taco.entrypoints.llm import LLM


class BeamSearchMixin:
    """The part of `LLM` that searches for the likeliest sequences."""

    def beam_search(
        self,
        prompts: Any,
        params: BeamSearchParams,
        lora_request: Any = None,
        use_tqdm: bool | Callable[..., Any] = False,
        concurrency_limit: int | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """Searches for the likeliest sequences that continue one or many prompts.

        All prompts are searched together. At each step the `2 * beam_width` likeliest next tokens of each beam are
        considered: those that end a sequence complete it, and of the others the best `beam_width` go on, up to
        `max_tokens` tokens or the end of the context. The model's secondary end-of-sequence tokens count too (vLLM 0.6
        overlooks them).

        Args:
            prompts: see `LLM.generate`.
            params: for all prompts. A `beam_width` above 10 needs a `max_logprobs` of twice as much.
            lora_request, priority: see `LLM.generate`.
            use_tqdm: show a progress bar, which counts the steps of all prompts; a callable is used in place of
                `tqdm.tqdm`.
            concurrency_limit: most prompts that are searched at once. Unset: as many as find a row for each beam
                (`max_num_seqs`).

        Returns:
            One output a prompt, in their order: at most `beam_width` sequences, best first. Each has the tokens and the
            text of prompt and output together.

        Raises:
            As `LLM.generate`.
        """
        llm = cast("LLM", self)
        engine = llm._generating_engine("beam_search")
        check_concurrency_limit(concurrency_limit)
        rows = split_prompts(prompts)
        columns = llm._columns(engine_params(params, engine.config), lora_request, priority)
        outputs = llm._run_batch(
            rows,
            columns,
            engine.input_processor.tokenize_options(None),
            False,
            "raise",
            has_choice=False,
            make_progress=lambda: BeamProgress(use_tqdm, len(rows), params.max_tokens, engine),
            max_unfinished=concurrency_limit,
        )
        skip = params.skip_special_tokens and not engine.config.behaviour.beam_text_keeps_special_tokens
        return [
            beam_output(rows[index], columns.lora_request_of(index), output, engine.input_processor.tokenizer, skip)
            for index, output in enumerate(outputs)
        ]


def engine_params(params: object, config: TacoConfig) -> SamplingParams:
    """What the engine is asked for.

    Raises:
        TacoValidationError: `params` are not for beam search.
    """
    if not isinstance(params, BeamSearchParams):
        raise TacoValidationError(
            f"params must be a BeamSearchParams, but is of type {type(params).__name__}; for a search by "
            "SamplingParams(use_beam_search=True) call generate.",
            parameter="params",
            value=params,
        )
    params.__post_init__()  # attributes may have been assigned since
    sampling_params = SamplingParams(
        temperature=params.temperature,
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        allowed_token_ids=params.allowed_token_ids,
        structured_outputs=params.structured_outputs,
        watermarking=params.watermarking,
        detokenize=config.behaviour.beam_logprobs_have_text,
        _beam_search_params=params,
    )
    params.configure_logprobs(sampling_params, config)  # the candidates of each step are returned
    return sampling_params


def check_concurrency_limit(limit: object) -> None:
    """Raises TacoValidationError if it is neither None nor an integer of at least 1."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise TacoValidationError(
            f"concurrency_limit must be an integer of at least 1, or None for no limit, got {limit!r}.",
            parameter="concurrency_limit",
            value=limit,
        )


def beam_output(
    prompt: object, lora_request: Any, output: RequestOutput, tokenizer: Any, skip_special_tokens: bool
) -> BeamSearchOutput:
    """The output of one prompt.

    Args:
        prompt: as it was given.
        lora_request: its adapter.
        output: what the engine found. A prompt that did not fit into the context has no sequences.
        tokenizer: makes the texts; None leaves them out.
        skip_special_tokens: for the texts.
    """
    sequences = []
    for completion in output.outputs:
        if not completion.token_ids:
            continue
        assert output.prompt_token_ids is not None
        assert completion.logprobs is not None and completion.cumulative_logprob is not None
        tokens = output.prompt_token_ids + completion.token_ids
        text = None
        if tokenizer is not None:
            text = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        sequences.append(
            BeamSearchSequence(
                tokens=tokens,
                logprobs=list(completion.logprobs),
                cum_logprob=completion.cumulative_logprob,
                text=text,
                orig_prompt=prompt,
                lora_request=lora_request,
            )
        )
    return BeamSearchOutput(sequences)


class BeamProgress(Progress):
    """Counts the steps of all prompts, in tokens.

    Args:
        use_tqdm: see `Progress`.
        num_prompts: how many are searched.
        max_tokens: most steps for each.
        engine: that searches.
    """

    def __init__(
        self, use_tqdm: bool | Callable[..., Any], num_prompts: int, max_tokens: int, engine: LLMEngine
    ) -> None:
        super().__init__(False, None)
        self._groups = engine.beam_groups
        self._num_shown = self._groups.num_steps
        if use_tqdm:
            self._bar = bar_class(use_tqdm)(
                total=num_prompts * max_tokens, desc="Beam search", unit="token", dynamic_ncols=True
            )

    def add(self, output: RequestOutput) -> None:
        """One more prompt has its output."""

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update(self._groups.num_steps - self._num_shown)
            self._num_shown = self._groups.num_steps
