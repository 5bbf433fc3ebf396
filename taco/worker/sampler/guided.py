"""Guided decoding: the tokens that a grammar does not allow are ruled out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from taco.kernels import native
from taco.kernels.token_mask import apply_token_mask, num_mask_words
from taco.plan import NewRow
from taco.reasoning import reasoning_has_ended
from taco.worker.sampler.feature import Feature, Selection
from taco.worker.transfer import to_device

if TYPE_CHECKING:
    from taco.guided.compiler import GrammarCompiler
    from taco.guided.protocol import Backend, Matcher
    from taco.sampling_params import SamplingParams

_MANY_ROWS = 4  # from here on their masks are worth several threads


class _StopTokens:
    """The tokens that end an output, as bits of a mask."""

    def __init__(self, token_ids: frozenset[int], vocab_size: int) -> None:
        self.token_ids = token_ids
        bits = np.zeros(num_mask_words(vocab_size), np.uint32)
        for token_id in token_ids:
            if 0 <= token_id < vocab_size:
                bits[token_id // 32] |= np.uint32(1 << token_id % 32)
        self.words = np.flatnonzero(bits)
        self.bits = bits[self.words].view(np.int32)


class _Row:
    """One output and its place in its grammar.

    Args:
        backend: that made the grammar.
        matcher: at its beginning.
        stops: tokens that may end the output where it is complete.
        final: one of these ends it where nothing else may follow.
        ends_of_reasoning: marks, as token ids, after the first of which the constrained text begins; none if it begins
            at once.
        max_tokens: of the output; None for any number.
    """

    __slots__ = (
        *("_all_ends", "_ends", "_num_accepted", "_thoughts", "backend", "error", "final"),
        *("is_over", "matcher", "max_tokens", "num_stops", "stops", "thinks"),
    )

    def __init__(
        self,
        backend: Backend,
        matcher: Matcher,
        stops: _StopTokens,
        final: _StopTokens,
        ends_of_reasoning: Sequence[Sequence[int]],
        max_tokens: int | None,
    ) -> None:
        self.backend = backend
        self.matcher = matcher
        self.stops = stops
        self.final = final
        self.num_stops = 0  # tokens at the end of the output that are no part of its text
        self.is_over = False
        self.thinks = bool(ends_of_reasoning)  # nothing is constrained yet
        self.error: str | None = None
        self._all_ends = stops.token_ids | final.token_ids
        self._ends = [list(ids) for ids in ends_of_reasoning]
        self._thoughts: list[int] = []  # tokens before the constrained text
        self._num_accepted = 0
        self.max_tokens = max_tokens

    def take(self, token_ids: Sequence[int]) -> None:
        """The next tokens of the output; a stop token, where it is complete, ends it."""
        if self.error is not None:
            return
        if not (self.thinks or self.num_stops) and self._all_ends.isdisjoint(token_ids):
            self._accept(token_ids)
            return
        for index, token_id in enumerate(token_ids):
            if self.thinks:
                self._thoughts.append(token_id)
                self.thinks = not any(self._thoughts[-len(ids) :] == ids for ids in self._ends)
                continue
            if (self.num_stops or token_id in self._all_ends) and (self.num_stops or self.matcher.can_stop()):
                self.num_stops += len(token_ids) - index
                self.is_over = True
                return
            if not self._accept([token_id]):
                return

    def _accept(self, token_ids: Sequence[int]) -> bool:
        """Takes tokens of the constrained text."""
        accepted = self.matcher.accept(token_ids)
        self._num_accepted += accepted
        if accepted == len(token_ids):
            return True
        self.error = f"guided decoding: token {token_ids[accepted]} was drawn, which the grammar does not allow"
        return False

    def take_back(self, num_tokens: int) -> None:
        """The last tokens were taken back."""
        stops = min(self.num_stops, num_tokens)
        self.num_stops -= stops
        self.is_over = self.num_stops > 0
        accepted = min(self._num_accepted, num_tokens - stops)
        self._num_accepted -= accepted
        self.matcher.rollback(accepted)
        if thoughts := num_tokens - stops - accepted:
            del self._thoughts[-thoughts:]
            self.thinks = True

    def may_stop(self) -> bool:
        """Whether a stop token may come next."""
        return self.thinks or self.matcher.can_stop()

    def must_stop(self) -> bool:
        """Whether nothing else may come next."""
        return self.error is None and not (self.thinks or self.is_over) and self.matcher.must_stop()

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next, for a row that need not stop."""
        if self.thinks:
            return True
        return self.matcher.can_stop() if token_id in self.stops.token_ids else self.matcher.allows(token_id)

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as there is one choice, for a row that need not stop."""
        if self.error is not None or self.is_over or self.thinks:
            return []
        found = self.matcher.forced()
        if not found:
            return found
        if self.max_tokens is not None:  # what comes later is cut off
            found = found[: max(0, self.max_tokens - len(self._thoughts) - self._num_accepted)]
        # A stop token cannot be text: where the grammar wants it as such, nothing may come.
        return list(itertools.takewhile(lambda token_id: token_id not in self.stops.token_ids, found))


class GuidedText(Feature):
    """The row's constraint, `SamplingParams.grammar`: only tokens that lead to a text that matches can be drawn.

    Stop tokens are allowed where the output is complete, and nowhere else. Where it is complete and nothing may follow,
    it ends even with `ignore_eos` and before `min_tokens`.

    Args:
        grammars: compiles constraints, or has done so.
        after_reasoning: the constrained text begins after the mark that ends the reasoning, which may be in the prompt.
    """

    follows_output = True

    def __init__(self, vocab_size: int, num_rows: int, grammars: GrammarCompiler, after_reasoning: bool) -> None:
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._after_reasoning = after_reasoning
        self._rows: dict[int, _Row] = {}
        self._stop_tokens: dict[frozenset[int], _StopTokens] = {}
        self._masks = np.zeros((0, num_mask_words(vocab_size)), np.int32)
        self._errors: dict[int, str] = {}
        self.must_stop = np.zeros(num_rows, bool)  # of each row: its text is complete, and nothing may follow

    def add(self, new: NewRow) -> bool:
        spec = new.params.grammar
        if spec is None:
            return False
        compilation = self._grammars.get(spec)
        assert compilation.grammar is not None
        stops, final = self._ends(new.params)
        marks: tuple[Sequence[int], ...] = ()
        if self._after_reasoning:
            markers = new.params.reasoning_markers
            assert markers is not None, "the input processor knows the marks"
            if not reasoning_has_ended(new.token_ids[: new.num_prompt_tokens], markers):
                marks = (markers.end_ids, markers.forced_ids)
        row = _Row(compilation.backend, compilation.grammar.start(), stops, final, marks, new.params.max_tokens)
        self._rows[new.row] = row
        self.append(new.row, new.token_ids[new.num_prompt_tokens :])
        return True

    def remove(self, row: int) -> None:
        del self._rows[row]
        self.must_stop[row] = False

    def append(self, row: int, token_ids: list[int]) -> None:
        state = self._rows[row]
        state.take(token_ids)
        self.must_stop[row] = state.must_stop()

    def rollback(self, row: int, num_tokens: int) -> None:
        state = self._rows[row]
        state.take_back(num_tokens)
        self.must_stop[row] = state.must_stop()

    def apply(self, selection: Selection, logits: torch.Tensor) -> None:
        masks = self.masks(selection.rows, selection.positions, logits.device)
        apply_token_mask(logits, masks, to_device(selection.positions, logits.device))

    def masks(self, row_numbers: np.ndarray, positions: np.ndarray, device: torch.device) -> torch.Tensor:
        """The tokens that each row may draw, int32 [n, words] on the device; valid until the next call.

        Args:
            row_numbers: int64 [n].
            positions: int64 [n], what `take_errors` calls the rows.
        """
        rows = [self._rows[row] for row in row_numbers.tolist()]
        return to_device(self._fill(rows, self.must_stop[row_numbers], positions, device.type != "cpu"), device)

    def allows(self, row_numbers: np.ndarray, positions: np.ndarray, token_ids: list[int]) -> np.ndarray:
        """Whether each row may draw its token, bool [n]: for one token that takes much less time than a mask.

        Args:
            row_numbers, positions: as for `masks`.
            token_ids: one a row.
        """
        found = np.empty(len(row_numbers), bool)
        must_stop = self.must_stop[row_numbers].tolist()
        for index, (row, token_id) in enumerate(zip(row_numbers.tolist(), token_ids, strict=True)):
            state = self._rows[row]
            if state.error is not None:
                self._errors[int(positions[index])] = state.error
                found[index] = True  # any token will do
            elif must_stop[index]:
                found[index] = token_id in state.final.token_ids
            else:
                found[index] = state.allows(token_id)
        return found

    def forced(self, row: int) -> list[int]:
        """The tokens that must come next, as far as there is one choice; they are not taken yet."""
        state = self._rows[row]
        if self.must_stop[row]:
            final = state.final.token_ids
            return list(final) if len(final) == 1 else []
        return state.forced()

    def is_over(self, row: int) -> bool:
        """Whether a token that ends the output has been taken."""
        return self._rows[row].is_over

    def take_errors(self) -> dict[int, str]:
        """What went wrong since the last call, by position."""
        errors, self._errors = self._errors, {}
        return errors

    def _ends(self, params: SamplingParams) -> tuple[_StopTokens, _StopTokens]:
        ends = {*(params.stop_token_ids or ())}
        if params.eos_token_id is not None:
            ends.add(params.eos_token_id)
        found = []
        for token_ids in (frozenset(ends), frozenset(ends or params.all_stop_token_ids)):
            if token_ids not in self._stop_tokens:
                if len(self._stop_tokens) >= 256:  # kinds of requests, not requests
                    self._stop_tokens.clear()
                self._stop_tokens[token_ids] = _StopTokens(token_ids, self._vocab_size)
            found.append(self._stop_tokens[token_ids])
        return found[0], found[1]

    def _fill(self, rows: list[_Row], must_stop: np.ndarray, positions: np.ndarray, on_device: bool) -> np.ndarray:
        """int32 [n, words]: the tokens that each row may draw."""
        if len(self._masks) < len(rows):
            self._masks = np.zeros((len(rows), self._masks.shape[1]), np.int32)
        masks = self._masks[: len(rows)]
        by_backend: dict[Backend, list[int]] = {}
        for index, row in enumerate(rows):
            if row.error is not None:
                self._errors[int(positions[index])] = row.error
            elif not (must_stop[index] or row.thinks):
                by_backend.setdefault(row.backend, []).append(index)
        for backend, group in by_backend.items():
            if len(group) == len(rows):
                part = masks
            else:
                part = np.empty((len(group), masks.shape[1]), np.int32)
            matchers = [rows[index].matcher for index in group]
            fill = functools.partial(backend.fill_masks, matchers, part)
            problems = native.with_idle_team(fill) if len(group) >= _MANY_ROWS and not on_device else fill()
            if part is not masks:
                masks[group] = part
            for index, problem in zip(group, problems, strict=True):
                if problem is not None:
                    rows[index].error = f"guided decoding: {problem}"
                    self._errors[int(positions[index])] = rows[index].error  # type: ignore[assignment]
        if must_stop.any():
            masks[must_stop] = 0
        by_ends: dict[tuple[_StopTokens, bool], list[int]] = {}
        for index, (row, stops_now) in enumerate(zip(rows, must_stop.tolist(), strict=True)):
            if row.error is not None or row.thinks:
                masks[index] = -1  # any token will do: with an error the row ends
            elif stops_now:
                by_ends.setdefault((row.final, True), []).append(index)
            else:
                by_ends.setdefault((row.stops, row.may_stop()), []).append(index)
        for (ends, may_come), group in by_ends.items():
            places = np.ix_(group, ends.words)
            masks[places] = masks[places] | ends.bits if may_come else masks[places] & ~ends.bits
        return masks
