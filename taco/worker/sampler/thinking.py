"""Budgets of reasoning: the mark that ends a section is forced once the section is long enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from taco.plan import NewRow
from taco.reasoning import ReasoningMarkers
from taco.worker.sampler.feature import Feature, Selection
from taco.worker.transfer import to_device


class ThinkingBudget(Feature):
    """`thinking_token_budget`: after so many tokens since the last start mark, the end mark follows.

    What is forced depends on the tokens of prompt and output alone, so a section that the prompt has opened counts, and
    what the prompt has of it. A section ends with the model's own end mark or with the forced one.

    It must be the last edit: a forced token comes whatever else would forbid it.
    """

    follows_output = True

    def __init__(self, num_rows: int) -> None:
        self._rows: dict[int, _Section] = {}
        self._forced = np.zeros(num_rows, np.int64)  # of each row: the token that must come next, or -1

    def add(self, new: NewRow) -> bool:
        budget = new.params.thinking_token_budget
        if budget is None:
            return False
        markers = new.params.reasoning_markers
        assert markers is not None, "the input processor knows the marks"
        section = self._rows[new.row] = _Section(budget, markers)
        section.append(new.token_ids)
        self._forced[new.row] = section.forced()
        return True

    def remove(self, row: int) -> None:
        del self._rows[row]

    def append(self, row: int, token_ids: list[int]) -> None:
        section = self._rows[row]
        section.append(token_ids)
        self._forced[row] = section.forced()

    def rollback(self, row: int, num_tokens: int) -> None:
        section = self._rows[row]
        section.rollback(num_tokens)
        self._forced[row] = section.forced()

    def apply(self, selection: Selection, logits: torch.Tensor) -> None:
        forced = self._forced[selection.rows]
        places = np.flatnonzero(forced >= 0)
        if len(places):
            positions = to_device(selection.positions[places], logits.device)
            logits.index_fill_(0, positions, -torch.inf)
            entries = selection.positions[places] * logits.shape[1] + forced[places]
            logits.view(-1).index_fill_(0, to_device(entries, logits.device), 0.0)


class _Section:
    """The tokens of one row, and where the last section of reasoning in them begins."""

    def __init__(self, budget: int, markers: ReasoningMarkers) -> None:
        self._budget = budget
        self._start = list(markers.start_ids)
        self._ends = [list(ids) for ids in {markers.end_ids, markers.forced_ids}]
        self._forced = list(markers.forced_ids)
        self._last_ids = {ids[-1] for ids in markers}
        self._tokens: list[int] = []
        # Ascending: the number of tokens up to the end of a mark, and whether it opens a section.
        self._marks: list[tuple[int, bool]] = []

    def append(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self._tokens.append(token_id)
            if token_id in self._last_ids:
                opens = self._ends_with(self._start)
                if opens or any(map(self._ends_with, self._ends)):
                    self._marks.append((len(self._tokens), opens))

    def rollback(self, num_tokens: int) -> None:
        del self._tokens[-num_tokens:]
        while self._marks and self._marks[-1][0] > len(self._tokens):
            self._marks.pop()

    def forced(self) -> int:
        """The token that must come next; -1 if any may."""
        if not self._marks or not self._marks[-1][1]:
            return -1
        num_thoughts = len(self._tokens) - self._marks[-1][0]
        if num_thoughts < self._budget:
            return -1
        # The end mark goes on where the section breaks off in the middle of it.
        length = min(len(self._forced) - 1, num_thoughts)
        while length and not self._ends_with(self._forced[:length]):
            length -= 1
        return self._forced[length]

    def _ends_with(self, ids: list[int]) -> bool:
        return self._tokens[-len(ids) :] == ids
