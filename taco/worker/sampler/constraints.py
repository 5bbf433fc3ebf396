"""Features that rule tokens out or shift single logits: allowed ids, bad words, n-grams, logit bias, minimum length.

Token ids for which the model has no logit are skipped: it cannot generate them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from taco.param_checks import MAX_LOGIT_BIAS
from taco.plan import NewRow
from taco.worker.sampler.feature import Feature, Selection
from taco.worker.sampler.tables import RaggedRows
from taco.worker.transfer import to_device


class _TokenTable(Feature):
    """A feature that acts on a list of token ids of each row."""

    def __init__(self, vocab_size: int, num_rows: int) -> None:
        self._vocab_size = vocab_size
        self._table = RaggedRows(num_rows)

    def remove(self, row: int) -> None:
        self._table.clear(row)

    def _known(self, token_ids: Iterable[int]) -> list[int]:
        return [token_id for token_id in token_ids if 0 <= token_id < self._vocab_size]

    def _entries(self, selection: Selection, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The selected rows' entries: index into the flattened logits (int64) and number (float32), on the device."""
        sources, token_ids, numbers = self._table.gather(selection.rows)
        index = selection.positions[sources] * self._vocab_size + token_ids
        return to_device(index, logits.device), to_device(numbers, logits.device)


class _Ban(_TokenTable):
    """A feature whose token ids are ruled out."""

    def apply(self, selection: Selection, logits: torch.Tensor) -> None:
        index, _ = self._entries(selection, logits)
        logits.view(-1).index_fill_(0, index, -torch.inf)


class AllowedTokens(_TokenTable):
    """`allowed_token_ids`: all other tokens are ruled out."""

    def add(self, new: NewRow) -> bool:
        if not new.params.allowed_token_ids:
            return False
        self._table.set(new.row, self._known(new.params.allowed_token_ids))
        return True

    def apply(self, selection: Selection, logits: torch.Tensor) -> None:
        index, _ = self._entries(selection, logits)
        kept = logits.view(-1)[index]
        logits.index_fill_(0, to_device(selection.positions, logits.device), -torch.inf)
        logits.view(-1)[index] = kept


class BannedTokens(_Ban):
    """Bad words of one token: always ruled out."""

    def add(self, new: NewRow) -> bool:
        banned = [word[0] for word in new.params.bad_words_token_ids or () if len(word) == 1]
        self._table.set(new.row, self._known(banned))
        return bool(banned)


class LogitBias(_TokenTable):
    """`logit_bias`: clamped to +-100 and added."""

    def add(self, new: NewRow) -> bool:
        bias = new.params.logit_bias
        if not bias:
            return False
        token_ids = self._known(bias)
        self._table.set(new.row, token_ids, np.clip([bias[i] for i in token_ids], -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS))
        return True

    def apply(self, selection: Selection, logits: torch.Tensor) -> None:
        index, bias = self._entries(selection, logits)
        flat = logits.view(-1)
        flat[index] = flat[index] + bias


class MinTokens(_Ban):
    """`min_tokens`: tokens that can end the sequence are ruled out until so many are generated.

    Args:
        must_stop: bool [num_rows], kept by another feature: rows that have to end nevertheless.
    """

    def __init__(self, vocab_size: int, num_rows: int, must_stop: np.ndarray | None = None) -> None:
        super().__init__(vocab_size, num_rows)
        self._min_tokens = np.zeros(num_rows, np.int64)
        self._must_stop = must_stop

    def add(self, new: NewRow) -> bool:
        params = new.params
        if not params.min_tokens or not params.all_stop_token_ids:
            return False
        self._min_tokens[new.row] = params.min_tokens
        self._table.set(new.row, self._known(params.all_stop_token_ids))
        return True

    def apply(self, selection: Selection, logits: torch.Tensor) -> None:
        short = selection.num_outputs < self._min_tokens[selection.rows]
        if self._must_stop is not None:
            short &= ~self._must_stop[selection.rows]
        if short.any():
            super().apply(Selection(*(part[short] for part in selection)), logits)


class BannedPhrases(_Ban):
    """Bad words of several tokens: the last one is ruled out while the output ends in those before it."""

    follows_output = True

    def __init__(self, vocab_size: int, num_rows: int) -> None:
        super().__init__(vocab_size, num_rows)
        # Of each row: the token before the last of each phrase -> what must come before that one, and the last token.
        self._phrases: dict[int, dict[int, list[tuple[list[int], int]]]] = {}
        self._outputs: dict[int, list[int]] = {}

    def add(self, new: NewRow) -> bool:
        phrases: dict[int, list[tuple[list[int], int]]] = {}
        for word in new.params.bad_words_token_ids or ():
            if len(word) > 1:
                phrases.setdefault(word[-2], []).append((list(word[:-2]), word[-1]))
        if not phrases:
            return False
        self._phrases[new.row] = phrases
        self._outputs[new.row] = new.token_ids[new.num_prompt_tokens :]
        self._update(new.row)
        return True

    def remove(self, row: int) -> None:
        super().remove(row)
        del self._phrases[row], self._outputs[row]

    def append(self, row: int, token_ids: list[int]) -> None:
        self._outputs[row] += token_ids
        self._update(row)

    def rollback(self, row: int, num_tokens: int) -> None:
        del self._outputs[row][-num_tokens:]
        self._update(row)

    def _update(self, row: int) -> None:
        output = self._outputs[row]
        banned = []
        if output:
            before_last = len(output) - 1
            for prefix, last in self._phrases[row].get(output[-1], ()):
                start = before_last - len(prefix)
                if start >= 0 and output[start:before_last] == prefix:
                    banned.append(last)
        self._table.set(row, self._known(banned))


class NoRepeatNgrams(_Ban):
    """`no_repeat_ngram_size` = n: no n tokens of prompt and output occur twice in a row.

    Keeps an index from each n - 1 tokens to those that followed them; what followed the last n - 1 is ruled out.
    """

    follows_output = True

    def __init__(self, vocab_size: int, num_rows: int) -> None:
        super().__init__(vocab_size, num_rows)
        self._sizes: dict[int, int] = {}
        self._tokens: dict[int, list[int]] = {}
        self._followers: dict[int, dict[tuple[int, ...], list[int]]] = {}

    def add(self, new: NewRow) -> bool:
        size = new.params.no_repeat_ngram_size
        if not size:
            return False
        self._sizes[new.row] = size
        self._tokens[new.row] = []
        self._followers[new.row] = {}
        self.append(new.row, new.token_ids)
        return True

    def remove(self, row: int) -> None:
        super().remove(row)
        del self._sizes[row], self._tokens[row], self._followers[row]

    def append(self, row: int, token_ids: list[int]) -> None:
        size, tokens, followers = self._sizes[row], self._tokens[row], self._followers[row]
        first = max(len(tokens), size - 1)
        tokens += token_ids
        for end in range(first, len(tokens)):
            followers.setdefault(tuple(tokens[end - size + 1 : end]), []).append(tokens[end])
        self._update(row)

    def rollback(self, row: int, num_tokens: int) -> None:
        size, tokens, followers = self._sizes[row], self._tokens[row], self._followers[row]
        for end in range(len(tokens) - 1, max(len(tokens) - num_tokens, size - 1) - 1, -1):
            followers[tuple(tokens[end - size + 1 : end])].pop()
        del tokens[-num_tokens:]
        self._update(row)

    def _update(self, row: int) -> None:
        size, tokens = self._sizes[row], self._tokens[row]
        last = tuple(tokens[len(tokens) - size + 1 :]) if len(tokens) >= size - 1 else None
        self._table.set(row, self._known(self._followers[row].get(last, ()) if last is not None else ()))
