"""The parts of the sampler: each is an object that knows the rows which use it and acts on those alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from taco.plan import NewRow


class Selection(NamedTuple):
    """Those rows of one call that use a feature.

    Args:
        positions: int64 [n], ascending: where their logits stand in the batch.
        rows: int64 [n]: their row numbers.
        num_outputs: int64 [n]: tokens generated before the one that is drawn now.
    """

    positions: np.ndarray
    rows: np.ndarray
    num_outputs: np.ndarray


class Feature:
    """An edit of logits that some rows ask for. A feature that no row of a batch uses is not called for that batch.

    Attributes:
        follows_output: the edits depend on the row's own output tokens, so these must be on the host before the next
            draw; `append` and `rollback` are called for the rows of such features only.
    """

    follows_output = False

    def add(self, new: NewRow) -> bool:
        """Takes a row in; False if it does not use the feature, which then hears no more of it."""
        raise NotImplementedError

    def remove(self, row: int) -> None:
        """Forgets a row that was taken in; numbers that `add` would set again may stay."""

    def append(self, row: int, token_ids: list[int]) -> None:
        """Tokens that were added to the row's output."""
        raise NotImplementedError

    def rollback(self, row: int, num_tokens: int) -> None:
        """The last `num_tokens` >= 1 output tokens were taken back."""
        raise NotImplementedError

    def apply(self, selection: Selection, logits: torch.Tensor) -> None:
        """Edits, in place, the selected rows of `logits`, float32 [N, vocab]."""
        raise NotImplementedError
