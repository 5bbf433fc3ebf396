"""Beam search written down plainly, with whole sequences at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NextLogprobs = Callable[[list[int]], list[float]]
Found = list[tuple[list[int], float]]  # generated tokens and score, best first


def score(output: list[int], logprob: float, num_prompt: int, length_penalty: float, eos: int | None, **options: Any):
    length = len(output)
    if options["score_includes_prompt"]:
        length += num_prompt - (output[-1] == eos)
    return logprob / length**length_penalty


def search_everything(
    prompt: list[int], next_logprobs: NextLogprobs, width: int, max_tokens: int, ends: set[int], **scoring: Any
) -> Found:
    """As `LLM.beam_search` of vLLM: each beam is extended by its best `2 * width` tokens, all of those that end a
    sequence complete it, and nothing but the lack of beams stops the search before its last step."""

    def rank(entry):
        return -score(*entry, len(prompt), **scoring)

    beams, completed = [([], 0.0)], []
    for _ in range(max_tokens):
        new = []
        for output, logprob in beams:
            logprobs = next_logprobs(prompt + output)
            for token in sorted(range(len(logprobs)), key=lambda token: -logprobs[token])[: 2 * width]:
                entry = ([*output, token], logprob + logprobs[token])
                (completed if token in ends else new).append(entry)
        beams = sorted(new, key=rank)[:width]
    best = sorted(completed + beams, key=rank)[:width]
    return [(output, -rank((output, logprob))) for output, logprob in best]


def search_with_early_stopping(
    prompt: list[int],
    next_logprobs: NextLogprobs,
    width: int,
    max_tokens: int,
    ends: set[int],
    early_stopping: bool | str,
    **scoring: Any,
) -> Found:
    """As the beam search inside sampling of early vLLM: of the best `2 * width` continuations of all beams those that
    end are kept if they are among the best `width` so far, and early stopping decides when that is enough."""

    def rank(entry):
        return -score(*entry, len(prompt), **scoring)

    beams, finished = [([], 0.0)], []
    for step in range(1, max_tokens + 1):
        new = []
        for output, logprob in beams:
            new += [([*output, token], logprob + more) for token, more in enumerate(next_logprobs(prompt + output))]
        new = sorted(new, key=lambda entry: -entry[1])[: 2 * width]
        ended = [entry for entry in new if entry[0][-1] in ends or step == max_tokens]
        finished = sorted(finished + ended, key=rank)[:width]
        beams = [entry for entry in new if entry not in ended][:width]
        if not beams:
            break
        if len(finished) == width:
            output, logprob = beams[0]
            # The last token never counts as an end here, so that only the length matters.
            unending = scoring | {"eos": None}
            longest = len(output)
            if early_stopping == "never" and scoring["length_penalty"] > 0:
                longest = max_tokens
            attainable = score([-1] * longest, logprob, len(prompt), **unending)
            if early_stopping is True or -rank(finished[-1]) >= attainable:
                break
    return [(output, -rank((output, logprob))) for output, logprob in finished]
