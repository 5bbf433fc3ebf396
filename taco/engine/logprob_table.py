"""Log-probabilities of one sequence, or of one prompt: arrays, from which positions are made when they are read."""

from __future__ import annotations

import numpy as np

from taco.engine.detokenizer import TextStream
from taco.logprobs import FlatLogprobs, LogprobsOnePosition
from taco.plan import LogprobRows

_MIN_CAPACITY = 16


class LogprobTable:
    """Rows of `LogprobRows`, appended step by step, and the positions that are made of them.

    A position has its own token first, then the others, the best first. Rows may be appended in one thread while
    another one makes positions.

    Args:
        stream: the text that the first row's token follows; it takes the tokens of the positions that are made. None
            makes positions without texts.
        flat: positions come as `FlatLogprobs`, not as a list of dicts.
        skips_special_tokens: special tokens have no text.
        in_context: texts join to that of the output; else each is that of its token, see `TextStream.preview`.
        others_are_ranked: the others are the most likely tokens; else they have no rank.
        capacity: how many rows there will be, if it is known.
    """

    def __init__(
        self,
        stream: TextStream | None,
        *,
        flat: bool,
        skips_special_tokens: bool,
        in_context: bool = True,
        others_are_ranked: bool = True,
        capacity: int = _MIN_CAPACITY,
    ) -> None:
        self._stream = stream
        self._skips_special_tokens = skips_special_tokens
        self._in_context = in_context
        self._others_are_ranked = others_are_ranked
        self._rows: LogprobRows | None = None  # with room behind them; replaced to grow, as a reader may hold them
        self._num_rows = 0
        self._capacity = capacity
        self._made: FlatLogprobs | list[LogprobsOnePosition | None] = FlatLogprobs() if flat else []
        self._num_rows_made = 0

    def __len__(self) -> int:
        """How many rows there are."""
        return self._num_rows

    def skip_first(self, token_id: int) -> None:
        """Makes a position for the first token of a prompt, which nothing predicts: it has no row."""
        self._made.append(None)
        if self._stream is not None:
            self._stream.append(token_id)

    def append(self, rows: LogprobRows) -> None:
        """Adds rows, as wide as those before."""
        end = self._num_rows + len(rows.ranks)
        if self._rows is None or end > self._capacity:
            self._reserve(max(end, self._capacity if self._rows is None else 2 * self._capacity), rows)
        assert self._rows is not None
        self._rows.token_ids[self._num_rows : end] = rows.token_ids
        self._rows.logprobs[self._num_rows : end] = rows.logprobs
        self._rows.ranks[self._num_rows : end] = rows.ranks
        self._num_rows = end

    def trim(self) -> None:
        """Gives back the room for further rows."""
        if self._rows is not None and self._num_rows < self._capacity:
            self._reserve(self._num_rows, self._rows)

    def own_logprobs(self, first: int = 0) -> list[float]:
        """The log-probabilities of the own tokens, from a row on."""
        values: list[float] = [] if self._rows is None else self._rows.logprobs[first : self._num_rows, 0].tolist()
        return values

    def positions(self, first: int = 0, last: int | None = None) -> FlatLogprobs | list[LogprobsOnePosition | None]:
        """The positions of rows `first` to `last`, exclusive; of all rows and what was skipped, if `last` is None."""
        end = self._num_rows if last is None else last
        if self._num_rows_made < end:
            assert self._rows is not None
            self._made.extend(self._make(self._rows[self._num_rows_made : end]))
            self._num_rows_made = end
        return self._made if last is None else self._made[first:last]

    def _reserve(self, capacity: int, like: LogprobRows) -> None:
        grown = LogprobRows(
            np.empty((capacity, like.token_ids.shape[1]), np.int32),
            np.empty((capacity, like.token_ids.shape[1]), np.float32),
            np.empty(capacity, np.int32),
        )
        if self._rows is not None:
            known = slice(self._num_rows)
            grown.token_ids[known] = self._rows.token_ids[known]
            grown.logprobs[known] = self._rows.logprobs[known]
            grown.ranks[known] = self._rows.ranks[known]
        self._rows = grown
        self._capacity = capacity

    def _make(self, rows: LogprobRows) -> FlatLogprobs:
        token_ids = rows.token_ids
        # The own token may come again among the others; -1 is padding.
        shown = token_ids >= 0
        shown[:, 1:] &= token_ids[:, 1:] != token_ids[:, :1]
        ends = shown.sum(1).cumsum()
        starts = ends - shown.sum(1)
        made = FlatLogprobs(starts.tolist(), ends.tolist(), token_ids[shown].tolist(), rows.logprobs[shown].tolist())
        if self._others_are_ranked:
            ranks = np.broadcast_to(np.arange(token_ids.shape[1], dtype=np.int32), token_ids.shape).copy()
            ranks[:, 0] = rows.ranks
            made.ranks = ranks[shown].tolist()
        else:
            made.ranks = [None] * len(made.token_ids)
            for start, rank in zip(made.start_indices, rows.ranks.tolist(), strict=True):
                made.ranks[start] = rank
        if self._stream is None:
            made.decoded_tokens = [None] * len(made.token_ids)
        else:
            preview, skips, in_context = self._stream.preview, self._skips_special_tokens, self._in_context
            for start, end in zip(made.start_indices, made.end_indices, strict=True):
                made.decoded_tokens += [preview(token_id, skips, in_context) for token_id in made.token_ids[start:end]]
                self._stream.append(made.token_ids[start])
        return made
