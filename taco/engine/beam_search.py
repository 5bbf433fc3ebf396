"""Beam search as a pure algorithm: log-probabilities in, surviving beams out. It knows no engine and no device.

A *beam* is a sequence that may still grow; a *hypothesis* is one that has ended. At each step every beam comes with its
most likely next tokens. Continuations that end become hypotheses, of which the best `width` are kept, and the best
`width` of the others are the next beams. (Graves, "Sequence Transduction with Recurrent Neural Networks", 2012; length
penalty of Wu et al., "Google's Neural Machine Translation System", 2016, in the simpler form that Hugging Face
transformers and vLLM use.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

import numpy as np

from taco.plan import Candidates, LogprobRows


@dataclass(frozen=True, slots=True)
class BeamOptions:
    """How a request is searched.

    Args:
        width: beams kept at each step.
        num_returned: hypotheses returned, at most `width`.
        length_penalty: a score is the summed log-probability over the length to this power.
        score_includes_prompt: the length counts the prompt, and not an end-of-sequence token at the end; else it is the
            number of generated tokens.
        early_stopping: what ends the search, once there are `width` hypotheses. True: that; False: no beam scores
            better than the worst of them now; "never": none can become better.
        ends_anywhere: a continuation that ends counts wherever it stands among those of its beam; else only if it is
            one of the best `2 * width` of all beams.
        num_candidates: tokens to be reported for each beam; at least `2 * width`, so that there are enough for the next
            beams although some end.
        keeps_candidates: they are wanted in the result.
    """

    width: int
    num_returned: int
    length_penalty: float
    score_includes_prompt: bool
    early_stopping: bool | Literal["never"]
    ends_anywhere: bool
    num_candidates: int
    keeps_candidates: bool


class Beam:
    """The last token of a sequence, with a link to what comes before it.

    Args:
        parent: what it continues; None for the prompt.
        token_id: -1 for the prompt.
        cumulative_logprob: of all generated tokens.
        candidates: that were there for the token, if they are kept.
    """

    __slots__ = ("candidates", "cumulative_logprob", "parent", "token_id")

    def __init__(
        self, parent: Beam | None, token_id: int, cumulative_logprob: float, candidates: Candidates | None
    ) -> None:
        self.parent = parent
        self.token_id = token_id
        self.cumulative_logprob = cumulative_logprob
        self.candidates = candidates

    def path(self) -> list[Beam]:
        """The beams from the first generated token to this one."""
        path = []
        beam = self
        while beam.parent is not None:
            path.append(beam)
            beam = beam.parent
        return path[::-1]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence that has ended.

    Args:
        score: what hypotheses are ranked by.
        beam: its last token.
        reached_limit: it has as many tokens as it may have, and was not ended by its last one.
    """

    score: float
    beam: Beam
    reached_limit: bool


class BeamSearch:
    """The search for one prompt.

    Args:
        options: see there.
        num_prompt_tokens: length of the prompt.
        max_tokens: most generated tokens.
        eos_token_id: end of sequence, or None if it ends nothing.
        stop_token_ids: further tokens that end a sequence.
        completes_stop: whether a token, appended to a beam, completes a text that ends the sequence; None if there are
            no such texts.

    Attributes:
        beams: the beams, best first.
        num_steps: steps done, which is the number of generated tokens of each beam.
    """

    def __init__(
        self,
        options: BeamOptions,
        *,
        num_prompt_tokens: int,
        max_tokens: int,
        eos_token_id: int | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
        completes_stop: Callable[[Beam, int], bool] | None = None,
    ) -> None:
        self._options = options
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._eos_token_id = eos_token_id
        self._end_ids = stop_token_ids if eos_token_id is None else stop_token_ids | {eos_token_id}
        self._completes_stop = completes_stop
        self._hypotheses: list[Hypothesis] = []  # best first, at most `width`
        self.beams = [Beam(None, -1, 0.0, None)]
        self.num_steps = 0

    def advance(self, candidates: Sequence[Candidates]) -> list[tuple[int, int]]:
        """Does one step; `beams` are then the new ones.

        Args:
            candidates: of each beam, equally many.

        Returns:
            What the new beams are, best first: the index of the old beam and the token appended to it. Empty if the
            search is over.
        """
        options = self._options
        old = self.beams
        self.beams = []
        self.num_steps += 1
        is_last = self.num_steps >= self._max_tokens
        # Lists, as arrays this small cost more than they save; and Python's floats, so that long sums do not drift.
        continuations = [
            (beam.cumulative_logprob + logprob, index, token_id)
            for index, (beam, row) in enumerate(zip(old, candidates, strict=True))
            for logprob, token_id in zip(row.logprobs.tolist(), row.token_ids.tolist(), strict=True)
        ]
        continuations.sort(key=itemgetter(0), reverse=True)  # stable
        if not options.ends_anywhere:
            del continuations[2 * options.width :]
        kept: list[Candidates | None] = [None] * len(old)
        if options.keeps_candidates:  # copies: these may be views of all rows of a batch
            kept = [Candidates(row.token_ids.copy(), row.logprobs.copy()) for row in candidates]

        survivors: list[tuple[int, int]] = []
        for cumulative_logprob, index, token_id in continuations:
            if cumulative_logprob == -math.inf:
                break  # ruled out, like all that follow
            ends = token_id in self._end_ids or (
                self._completes_stop is not None and self._completes_stop(old[index], token_id)
            )
            if not ends and len(survivors) == options.width:
                continue
            beam = Beam(old[index], token_id, cumulative_logprob, kept[index])
            if ends:
                self._end(beam, False)
            else:
                survivors.append((index, token_id))
                self.beams.append(beam)
        if is_last:
            for beam in self.beams:
                self._end(beam, True)
        if is_last or not self.beams or self._stops_early():
            self.beams = []
            return []
        return survivors

    def best(self) -> list[Hypothesis]:
        """The best hypotheses, best first; among equals those that ended first."""
        return self._hypotheses[: self._options.num_returned]

    def score(self, cumulative_logprob: float, num_tokens: int, ends_with_eos: bool) -> float:
        """Score of a sequence of so many generated tokens."""
        length = max(num_tokens, 1)
        if self._options.score_includes_prompt:
            length = self._num_prompt_tokens + num_tokens - ends_with_eos
        # The exponent is bounded, as an extreme penalty would overflow.
        return cumulative_logprob * math.exp(min(-self._options.length_penalty * math.log(length), 700.0))

    def _end(self, beam: Beam, reached_limit: bool) -> None:
        score = self.score(beam.cumulative_logprob, self.num_steps, beam.token_id == self._eos_token_id)
        hypotheses = self._hypotheses
        if len(hypotheses) < self._options.width or score > hypotheses[-1].score:
            hypotheses.append(Hypothesis(score, beam, reached_limit))
            hypotheses.sort(key=lambda hypothesis: -hypothesis.score)  # stable: earlier ones win ties
            del hypotheses[self._options.width :]

    def _stops_early(self) -> bool:
        options = self._options
        if len(self._hypotheses) < options.width:
            return False
        if options.early_stopping is True:
            return True
        num_tokens = self.num_steps
        if options.early_stopping == "never" and options.length_penalty > 0:
            num_tokens = self._max_tokens  # sums only fall, but the longer a sequence is, the less they count
        best = self.score(self.beams[0].cumulative_logprob, num_tokens, False)
        return self._hypotheses[-1].score >= best


def logprob_rows(path: Sequence[Beam], num_best: int, rank_counts_ties: bool) -> LogprobRows:
    """Log-probabilities of a sequence whose candidates were kept.

    Args:
        path: its generated tokens.
        num_best: most likely tokens wanted at each position.
        rank_counts_ties: see `taco.compat.Behaviour`.
    """
    kept = [beam.candidates for beam in path if beam.candidates is not None]
    token_ids = np.stack([candidates.token_ids for candidates in kept])
    logprobs = np.stack([candidates.logprobs for candidates in kept])
    own_ids = np.array([[beam.token_id] for beam in path], np.int32)
    own = np.take_along_axis(logprobs, (token_ids == own_ids).argmax(1, keepdims=True), 1)
    ranks = (logprobs >= own).sum(1) if rank_counts_ties else (logprobs > own).sum(1) + 1
    return LogprobRows(
        np.concatenate((own_ids, token_ids[:, :num_best]), 1),
        np.concatenate((own, logprobs[:, :num_best]), 1),
        ranks.astype(np.int32),
    )
