"""The draw of marked rows: with the numbers of a watermark, in place of the row's own random number."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from taco.plan import NewRow
from taco.watermark import (
    MAX_GUMBEL,
    MIN_GUMBEL,
    PADDING_TOKEN,
    WatermarkConfig,
    context_words,
    token_words,
    uniforms,
)
from taco.worker.sampler.feature import Feature, Selection
from taco.worker.sampler.filters import is_greedy
from taco.worker.sampler.random import uniform
from taco.worker.transfer import to_device

# Logits handled at a time; on a CPU the temporaries then stay in the cache.
BLOCK_ENTRIES_CPU = 1 << 18
BLOCK_ENTRIES = 1 << 22
ENTRY_BYTES = 90  # what the temporaries take for each


class Watermark(Feature):
    """`watermarking`: see `taco.watermark` for what is drawn.

    A row whose context occurred before keeps the token that was drawn without a mark.

    Args:
        config: None where no row is marked.
    """

    follows_output = True

    def __init__(self, config: WatermarkConfig | None, num_rows: int) -> None:
        self._config = config
        if config is None:
            return
        self._keys = config.key_words()
        self._seeds = np.zeros(num_rows, np.uint64)
        self._contexts = np.zeros((num_rows, config.width), np.int64)
        self._is_fresh = np.zeros(num_rows, bool)
        self._histories: dict[int, _History] = {}

    def add(self, new: NewRow) -> bool:
        if not new.params.watermarking or is_greedy(new) or new.num_candidates:
            return False
        assert self._config is not None, "the input processor knows whether rows can be marked"
        row = new.row
        self._seeds[row] = new.seed
        start = 0 if self._config.deduplicate_contexts == "all" else new.num_prompt_tokens
        self._histories[row] = _History(self._config, new.num_prompt_tokens - start)
        self.append(row, new.token_ids[start:])
        return True

    def remove(self, row: int) -> None:
        del self._histories[row]

    def append(self, row: int, token_ids: list[int]) -> None:
        self._histories[row].append(token_ids)
        self._update(row)

    def rollback(self, row: int, num_tokens: int) -> None:
        self._histories[row].rollback(num_tokens)
        self._update(row)

    def _update(self, row: int) -> None:
        history = self._histories[row]
        self._contexts[row] = history.context()
        self._is_fresh[row] = not history.repeats()

    def replace(
        self,
        selection: Selection,
        num_tokens: np.ndarray,
        logits: torch.Tensor,
        peaks: torch.Tensor,
        token_ids: torch.Tensor,
    ) -> None:
        """Writes marked tokens over those drawn.

        Args:
            selection: the rows.
            num_tokens: int64 [n]: tokens before the one that is drawn, prompt and output.
            logits: float32 [N, vocab], after all edits and filters.
            peaks: float32 [N], the largest logit of each row.
            token_ids: int64 [N], changed in place.
        """
        fresh = np.flatnonzero(self._is_fresh[selection.rows])
        if not len(fresh):
            return
        rows = selection.rows[fresh]
        keys = np.zeros(len(rows), np.int64)
        if len(self._keys) > 1:
            keys += uniform(self._seeds[rows], num_tokens[fresh]) < self._config.alpha
        device = logits.device
        words = to_device(context_words(self._contexts[rows], self._keys[keys]), device)
        places = to_device(selection.positions[fresh], device)
        entries = BLOCK_ENTRIES_CPU if device.type == "cpu" else BLOCK_ENTRIES
        block = max(1, entries // logits.shape[1])
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            own = places[part]
            token_ids[own] = draw_marked(logits[own], peaks[own], words[:, part])


def draw_marked(logits: torch.Tensor, peaks: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The token of each row with the largest sum of logit and the watermark's noise.

    Args:
        logits: float32 [n, vocab]; -inf has probability 0.
        peaks: float32 [n], the largest of each row. Where it is not finite the row gets some valid token.
        words: int64 [5, n]: of the rows' contexts, see `taco.watermark.context_words`.

    Returns:
        int64 [n].
    """
    num_rows, vocab = logits.shape
    # Four tokens share a call of the generator.
    groups = functional.pad(logits, (0, -vocab % 4), value=-torch.inf).view(num_rows, -1, 4)
    # Below this no noise is large enough to win against the peak, even if that has the least.
    floor = peaks - (MAX_GUMBEL - MIN_GUMBEL)
    rows, alive = (groups >= floor[:, None, None]).any(-1).nonzero(as_tuple=True)
    numbers = torch.stack([uniforms(word) for word in token_words(alive, words[:, rows])], -1)
    scores = torch.full(groups.shape, -torch.inf, dtype=torch.float64, device=logits.device)
    # In double precision, as the last bit of vectorised float32 functions depends on where in memory they stand.
    scores[rows, alive] = groups[rows, alive].double() - numbers.log_().neg_().log_()
    return scores.view(num_rows, -1).argmax(-1)


class _History:
    """The tokens of one row, and the contexts that have occurred in them.

    The context of a position is the `width` tokens before it; before the first token stands padding.

    Args:
        num_prompt_tokens: how many of its tokens are prompt: none unless contexts are looked for there.
    """

    def __init__(self, config: WatermarkConfig, num_prompt_tokens: int) -> None:
        self._width = config.width
        self._scope = config.deduplicate_contexts
        self._max_history = config.deduplicate_contexts_max_history
        self._num_prompt = num_prompt_tokens
        self._tokens = [PADDING_TOKEN] * self._width
        self._positions: dict[tuple[int, ...], list[int]] = {}  # of each context, ascending

    def append(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            if self._scope != "none":
                self._positions.setdefault(self.context(), []).append(self._num_tokens)
            self._tokens.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._tokens.pop()
            if self._scope != "none":
                self._positions[self.context()].pop()

    def context(self) -> tuple[int, ...]:
        """Of the next token."""
        return tuple(self._tokens[-self._width :])

    def repeats(self) -> bool:
        """Whether the next token is to be drawn without a mark."""
        if self._scope == "all" and self._num_tokens - self._num_prompt < self._width:
            return True  # a detector does not know the prompt
        positions = self._positions.get(self.context())
        if not positions:
            return False
        return self._max_history is None or positions[-1] >= self._num_tokens - self._max_history

    @property
    def _num_tokens(self) -> int:
        return len(self._tokens) - self._width
