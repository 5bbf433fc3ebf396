"""Guided decoding through outlines-core: each state of an automaton knows its tokens, so masks cost next to nothing.

The automaton of the whole vocabulary is built beforehand (see `outlines_builder.py`), which takes seconds for a large
constraint, and minutes for some short ones. A text that may end or go on is a problem for the library: it learns one
byte late that an expression has matched, and drops tokens there that lead on. So the expressions get a last character
that no output has, NUL, and the output is complete where that character could follow.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from taco.guided.choices import read_choices
from taco.guided.outlines_builder import OutlinesBuilder
from taco.guided.protocol import CompiledGrammar, GrammarError, Matcher
from taco.guided.regex import either, num_positions, parse_regex, parse_whitespace, without_chars, write_regex
from taco.guided.schema import read_schema
from taco.guided.spec import GrammarKind, GrammarSpec
from taco.guided.vocabulary import Vocabulary

MAX_POSITIONS = 4000  # of an expression; the library has no limit of its own, and takes seconds for so many
MAX_MASKS = 2048  # of one grammar that are kept


class OutlinesBackend:
    """See `taco.guided.protocol.Backend`. It knows regular languages alone: no recursion, no grammars.

    Args:
        vocabulary: of the model.

    Raises:
        GrammarError: the package is not installed.
    """

    name = "outlines"

    def __init__(self, vocabulary: Vocabulary) -> None:
        try:
            import outlines_core
            import outlines_core.json_schema
        except ImportError as error:
            raise GrammarError(
                f'The backend "outlines" of guided decoding needs its package: pip install outlines-core ({error}).'
            ) from error
        self._library: Any = outlines_core
        self._size = vocabulary.size
        # Two ids that no token has: one for the last character, and one for the library's own end of sequence.
        self._last_id = vocabulary.size
        tokens = {piece: ids for piece, ids in vocabulary.ids_of_bytes.items() if b"\0" not in piece}
        tokens[b"\0"] = [self._last_id]
        self._builder = OutlinesBuilder(vocabulary.size + 1, tokens)

    def check(self, spec: GrammarSpec) -> None:
        self._regex(spec)

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        index = self._builder.build(rf"(?:{self._regex(spec)})\x00")
        return _Grammar(index, self._last_id, self._size)

    def fill_masks(self, matchers: Sequence[Matcher], masks: np.ndarray) -> list[str | None]:
        for row, matcher in enumerate(matchers):
            masks[row] = cast(_Matcher, matcher).allowed().mask
        return [None] * len(matchers)

    def _regex(self, spec: GrammarSpec) -> str:
        """The constraint as a regular expression, in the library's syntax."""
        if spec.kind is GrammarKind.REGEX:
            node = parse_regex(spec.source)
        elif spec.kind is GrammarKind.CHOICE:
            node = either(read_choices(spec.source))
        elif spec.kind is GrammarKind.JSON:
            node = parse_regex(self._regex_of_schema(spec))
        else:
            raise GrammarError(f'The backend "outlines" has no constraints of the kind {spec.kind.value!r}.')
        if (size := num_positions(node)) > MAX_POSITIONS:
            raise GrammarError(
                f'The backend "outlines" would build an automaton from {size} positions; at most {MAX_POSITIONS} are '
                'compiled. Make the constraint smaller, or take backend="llguidance", which has no such limit.'
            )
        return write_regex(without_chars(node, ((0, 0),)))

    def _regex_of_schema(self, spec: GrammarSpec) -> str:
        schema = read_schema(spec.source, spec.additional_properties)
        schema.refuse_unless_enforced(self.name)
        whitespace = r"[ ]?" if spec.any_whitespace else ""
        if spec.whitespace_pattern is not None:
            whitespace = write_regex(parse_whitespace(spec.whitespace_pattern))
        try:
            return cast(str, self._library.json_schema.build_regex_from_schema(json.dumps(schema.root), whitespace))
        except Exception as error:
            raise GrammarError(f"outlines-core makes no expression of the JSON schema: {error}") from None


class _Allowed:
    """What may come next in one state.

    Attributes:
        mask: int32 [W].
        single: the only token, or None.
        is_empty: whether there is none.
    """

    __slots__ = ("is_empty", "mask", "single")

    def __init__(self, token_ids: np.ndarray, size: int) -> None:
        flags = np.zeros(-(-size // 32) * 32, bool)
        flags[token_ids] = True
        self.mask = np.packbits(flags, bitorder="little").view(np.int32)
        self.single = int(token_ids[0]) if len(token_ids) == 1 else None
        self.is_empty = len(token_ids) == 0


class _Grammar:
    def __init__(self, index: Any, last_id: int, size: int) -> None:
        self.index = index
        self.last_id = last_id
        self.initial: int = index.get_initial_state()
        self._final = set(index.get_final_states())
        self._size = size
        self._lock = threading.Lock()
        self._allowed: OrderedDict[int, _Allowed] = OrderedDict()
        transitions = index.get_transitions()
        num_transitions = sum(map(len, transitions.values()))
        self.num_bytes = 24 * num_transitions + min(len(transitions), MAX_MASKS) * size // 8

    def start(self) -> Matcher:
        return _Matcher(self)

    def can_stop(self, state: int) -> bool:
        # The last character leads on, but not to the end, where the expression takes any character.
        return self.index.get_next_state(state, self.last_id) in self._final

    def allowed(self, state: int) -> _Allowed:
        with self._lock:
            found = self._allowed.get(state)
        if found is None:
            token_ids = np.array(self.index.get_allowed_tokens(state) or (), np.int64)
            found = _Allowed(token_ids[token_ids < self.last_id], self._size)
            with self._lock:
                self._allowed[state] = found
                if len(self._allowed) > MAX_MASKS:
                    self._allowed.popitem(last=False)
        return found


class _Matcher:
    __slots__ = ("_grammar", "_states")

    def __init__(self, grammar: _Grammar) -> None:
        self._grammar = grammar
        self._states = [grammar.initial]

    def accept(self, token_ids: Sequence[int]) -> int:
        for count, token_id in enumerate(token_ids):
            after = self._next(self._states[-1], token_id)
            if after is None:
                return count
            self._states.append(after)
        return len(token_ids)

    def rollback(self, num_tokens: int) -> None:
        del self._states[len(self._states) - num_tokens :]

    def allows(self, token_id: int) -> bool:
        return self._next(self._states[-1], token_id) is not None

    def forced(self) -> list[int]:
        found: list[int] = []
        state = self._states[-1]
        while not self._grammar.can_stop(state) and (token_id := self._grammar.allowed(state).single) is not None:
            found.append(token_id)
            after = self._next(state, token_id)
            assert after is not None
            state = after
        return found

    def can_stop(self) -> bool:
        return self._grammar.can_stop(self._states[-1])

    def must_stop(self) -> bool:
        return self.can_stop() and self.allowed().is_empty

    def allowed(self) -> _Allowed:
        return self._grammar.allowed(self._states[-1])

    def _next(self, state: int, token_id: int) -> int | None:
        if token_id >= self._grammar.last_id:
            return None
        return cast("int | None", self._grammar.index.get_next_state(state, token_id))
