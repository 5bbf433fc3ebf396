"""Log-probabilities of tokens and of their most likely alternatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from taco.kernels.sampling import best_tokens, count_above
from taco.plan import LogprobRows, NewRow
from taco.worker.sampler.feature import Feature, Selection
from taco.worker.sampler.tables import RaggedRows, select_rows, to_device

MODES = ("processed_logprobs", "raw_logprobs", "processed_logits", "raw_logits")


class Scores(NamedTuple):
    """Log-probabilities of n positions, still on the device; see `taco.plan.LogprobRows`.

    Args:
        token_ids: int64 [n, 1 + k].
        values: float32 [n, 1 + k].
        ranks: int64 [n].
    """

    token_ids: torch.Tensor
    values: torch.Tensor
    ranks: torch.Tensor


class Logprobs(Feature):
    """`logprobs`, `logprob_token_ids` and `prompt_logprobs`.

    Args:
        mode: what is reported, log-probabilities or logits, and of which state: "raw" as the model gave them, or
            "processed" as the token is drawn from them (tokens that are ruled out have -inf).
        rank_counts_ties: the rank of a token counts the tokens as likely as it, not only the likelier ones.
    """

    def __init__(self, vocab_size: int, num_rows: int, mode: str, rank_counts_ties: bool) -> None:
        assert mode in MODES, mode
        self.raw = mode.startswith("raw")
        self._normalise = mode.endswith("logprobs")
        self._rank_counts_ties = rank_counts_ties
        self._vocab_size = vocab_size
        self._num_best = np.zeros(num_rows, np.int64)
        self._given = RaggedRows(num_rows)
        self._num_given = np.zeros(num_rows, np.int64)

    def add(self, new: NewRow) -> bool:
        params = new.params
        given = params.logprob_token_ids
        if given:
            # Exactly these are wanted, in place of the most likely ones.
            self._given.set(new.row, given)
            self._num_given[new.row] = len(given)
        elif params.logprobs is None:
            return False
        else:
            self._num_best[new.row] = self._count(params.logprobs)
        return True

    def remove(self, row: int) -> None:
        self._given.clear(row)
        self._num_best[row] = self._num_given[row] = 0

    def collect(
        self, selection: Selection, logits: torch.Tensor, token_ids: torch.Tensor
    ) -> Iterator[tuple[np.ndarray, Scores]]:
        """Positions and scores of the selected rows, in groups of rows that want equally many.

        Args:
            logits: float32 [n, vocab] of the selected rows; not changed.
            token_ids: int64 [n], what was drawn.
        """
        num_best, num_given = self._num_best[selection.rows], self._num_given[selection.rows]
        for best, given in np.unique(np.stack((num_best, num_given)), axis=1).T.tolist():
            group = np.flatnonzero((num_best == best) & (num_given == given))
            others = None
            if given:
                _, given_ids, _ = self._given.gather(selection.rows[group])
                others = to_device(given_ids.astype(np.int64).reshape(len(group), given), logits.device)
            own = select_rows(token_ids, group)
            yield selection.positions[group], self._score(select_rows(logits, group), own, best, others)

    def score_prompt(self, logits: torch.Tensor, token_ids: torch.Tensor, num_best: int) -> Scores:
        """Scores of M prompt tokens, int64 [M], under the logits, float32 [M, vocab], of their predecessors."""
        return self._score(logits, token_ids, self._count(num_best), None)

    def _count(self, num_best: int) -> int:
        return self._vocab_size if num_best == -1 else min(num_best, self._vocab_size)

    def _score(self, logits: torch.Tensor, own: torch.Tensor, num_best: int, others: torch.Tensor | None) -> Scores:
        scores = logits.log_softmax(-1) if self._normalise else logits
        token_ids = own[:, None]
        values = scores.gather(1, token_ids)
        ranks = count_above(scores, values[:, 0], self._rank_counts_ties)
        if not self._rank_counts_ties:
            ranks = ranks + 1
        if num_best:
            best_values, others = best_tokens(scores, num_best)
            return Scores(torch.cat((token_ids, others), 1), torch.cat((values, best_values), 1), ranks)
        if others is not None:
            return Scores(torch.cat((token_ids, others), 1), torch.cat((values, scores.gather(1, others)), 1), ranks)
        return Scores(token_ids, values, ranks)


def to_host(scores: list[Scores]) -> list[LogprobRows]:
    """Brings scores to the host in one copy."""
    if not scores:
        return []
    parts = []
    for part in scores:
        parts += [part.token_ids.int().flatten(), part.values.view(torch.int32).flatten(), part.ranks.int()]
    numbers = torch.cat(parts).cpu().numpy()
    rows = []
    start = 0
    for part in scores:
        num_rows, width = part.token_ids.shape
        ids, values, ranks = np.split(numbers[start:], np.cumsum([num_rows * width, num_rows * width, num_rows]))[:3]
        rows.append(LogprobRows(ids.reshape(num_rows, width), values.view(np.float32).reshape(num_rows, width), ranks))
        start += num_rows * (2 * width + 1)
    return rows
