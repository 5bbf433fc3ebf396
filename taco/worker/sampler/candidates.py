"""The most likely next tokens of rows whose next token the host chooses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from taco.kernels.sampling import best_tokens
from taco.plan import Candidates, NewRow
from taco.worker.sampler.feature import Feature, Selection
from taco.worker.sampler.tables import select_rows


class CandidateTokens(Feature):
    """`NewRow.num_candidates`.

    Args:
        raw: log-probabilities are the model's own, and edits of the logits only rule tokens out. Rows with
            `use_beam_search` are scored after all edits nevertheless: penalties are to guide their search.
    """

    def __init__(self, vocab_size: int, num_rows: int, raw: bool) -> None:
        self.raw = raw
        self._vocab_size = vocab_size
        self._num_candidates = np.zeros(num_rows, np.int64)
        self._is_raw = np.zeros(num_rows, bool)

    def add(self, new: NewRow) -> bool:
        self._num_candidates[new.row] = min(new.num_candidates, self._vocab_size)
        self._is_raw[new.row] = self.raw and not new.params.use_beam_search
        return new.num_candidates > 0

    def collect(
        self, selection: Selection, logits: torch.Tensor, raw_logits: torch.Tensor | None
    ) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """Positions, token ids (int64 [n, k]) and log-probabilities (float32 [n, k]), still on the device, of the
        selected rows, in groups of rows that are scored alike.

        Args:
            logits: float32 [n, vocab] of the selected rows, after all edits; not changed.
            raw_logits: the same before all edits, in "raw" modes.
        """
        num_candidates, is_raw = self._num_candidates[selection.rows], self._is_raw[selection.rows]
        for k, from_raw in np.unique(np.stack((num_candidates, is_raw)), axis=1).T.tolist():
            group = np.flatnonzero((num_candidates == k) & (is_raw == from_raw))
            edited = select_rows(logits, group)
            if from_raw:
                assert raw_logits is not None
                scores = select_rows(raw_logits, group).log_softmax(-1).masked_fill_(edited == -torch.inf, -torch.inf)
            else:
                scores = edited.log_softmax(-1)
            logprobs, token_ids = best_tokens(scores, k)
            yield selection.positions[group], token_ids, logprobs


def candidates_to_host(groups: list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]) -> dict[int, Candidates]:
    """Candidates by position; waits for the device."""
    found = {}
    for positions, token_ids, logprobs in groups:
        # Both in one copy.
        numbers = torch.cat((token_ids.int(), logprobs.view(torch.int32)), 1).cpu().numpy()
        ids, values = np.split(numbers, 2, axis=1)
        for position, row_ids, row_values in zip(positions.tolist(), ids, values.view(np.float32), strict=True):
            found[position] = Candidates(row_ids, row_values)
    return found
