"""`LLM.beam_search`: its parameters as the engine takes them, its outputs, its progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taco.compat import Behaviour
from taco.engine.llm_engine import LLMEngine
from taco.entrypoints.progress import Progress, bar_class
from taco.errors import TacoValidationError
from taco.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from taco.sampling_params import BeamSearchParams, SamplingParams


def engine_params(params: object, behaviour: Behaviour, vocab_size: int) -> SamplingParams:
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
    return SamplingParams(
        temperature=params.temperature,
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        logprobs=min(2 * params.beam_width, vocab_size),  # the candidates of each step, which are returned
        allowed_token_ids=params.allowed_token_ids,
        structured_outputs=params.structured_outputs,
        watermarking=params.watermarking,
        detokenize=behaviour.beam_logprobs_have_text,
        _beam_search_params=params,
    )


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
