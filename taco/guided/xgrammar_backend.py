"""Guided decoding through xgrammar, where that package is installed: context-free grammars, compiled ahead."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from taco.guided.choices import read_choices
from taco.guided.protocol import CompiledGrammar, GrammarError, Matcher
from taco.guided.regex import Chars, Node, either, num_positions, parse_regex, parts_of, write_regex
from taco.guided.schema import read_schema
from taco.guided.spec import GrammarKind, GrammarSpec
from taco.guided.vocabulary import Vocabulary

MAX_POSITIONS = 20_000  # of a regular expression


class XGrammarBackend:
    """See `taco.guided.protocol.Backend`.

    Args:
        vocabulary: of the model.

    Raises:
        GrammarError: the package is not installed.
    """

    name = "xgrammar"

    def __init__(self, vocabulary: Vocabulary) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise GrammarError(
                'The backend "xgrammar" of guided decoding needs its package: pip install "taco-llm[xgrammar]" '
                f"({error})."
            ) from error
        self._library: Any = xgrammar
        # The library needs a token for the end, which is cleared from its masks. An id of our own would be beyond the
        # vocabulary's size, which masks have.
        self._no_text = frozenset(i for i, piece in enumerate(vocabulary.tokens) if not piece)
        if not self._no_text:
            raise GrammarError('The backend "xgrammar" needs a tokenizer with a token that is no text.')
        self._end_id = min(self._no_text)
        tokens = xgrammar.TokenizerInfo(
            list(vocabulary.tokens), vocab_size=vocabulary.size, stop_token_ids=[self._end_id]
        )
        self._compiler = xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False)
        self._size = vocabulary.size

    def check(self, spec: GrammarSpec) -> None:
        if spec.kind is GrammarKind.GRAMMAR:
            self._checked(lambda: self._library.Grammar.from_ebnf(spec.source))
        elif spec.kind is GrammarKind.JSON:
            schema = self._schema(spec)
            self._checked(lambda: self._library.Grammar.from_json_schema(schema, **_json_options(spec)))
        else:
            self._regex(spec)

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        compiler = self._compiler
        if spec.kind is GrammarKind.GRAMMAR:
            compiled = self._checked(lambda: compiler.compile_grammar(spec.source))
        elif spec.kind is GrammarKind.JSON:
            schema = self._schema(spec)
            compiled = self._checked(lambda: compiler.compile_json_schema(schema, **_json_options(spec)))
        else:
            regex = self._regex(spec)
            compiled = self._checked(lambda: compiler.compile_regex(regex))
        grammar = _Grammar(self._library, compiled, self._end_id, self._no_text, self._size)
        first = grammar.start()
        mask = np.empty((1, -(-self._size // 32)), np.int32)
        if not first.can_stop() and (self.fill_masks([first], mask)[0] is not None or not mask.any()):
            raise GrammarError("No text matches the constraint, or none that the tokens of the model can write.")
        return grammar

    def fill_masks(self, matchers: Sequence[Matcher], masks: np.ndarray) -> list[str | None]:
        problems: list[str | None] = []
        for row, matcher in enumerate(matchers):
            own = cast(_Matcher, matcher)
            try:
                own.fill(masks, row)
                problems.append(None)
            except Exception as error:  # the library's own: a state that it cannot represent
                masks[row] = 0
                problems.append(f"xgrammar: {error}")
        return problems

    def _checked(self, make: Any) -> Any:
        try:
            return make()
        except Exception as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise GrammarError(f"xgrammar does not take the constraint: {reason}") from None

    def _schema(self, spec: GrammarSpec) -> str:
        schema = read_schema(spec.source, spec.additional_properties)
        schema.refuse_unless_enforced(self.name)
        if spec.whitespace_pattern is not None:
            raise GrammarError('The backend "xgrammar" does not enforce a whitespace_pattern.')
        return json.dumps(schema.root)

    def _regex(self, spec: GrammarSpec) -> str:
        if spec.kind is GrammarKind.REGEX:
            node = parse_regex(spec.source)
        elif spec.kind is GrammarKind.CHOICE:
            node = either(read_choices(spec.source))
        else:
            raise GrammarError(f'The backend "xgrammar" has no constraints of the kind {spec.kind.value!r} here.')
        if _has_wide_class(node):
            raise GrammarError(
                'The backend "xgrammar" allows tokens that it then refuses, where a regular expression has sets of '
                "characters beyond ASCII."
            )
        if (size := num_positions(node)) > MAX_POSITIONS:
            raise GrammarError(
                f'The expression has {size} positions; the backend "xgrammar" compiles at most {MAX_POSITIONS}.'
            )
        return write_regex(node)


def _has_wide_class(node: Node) -> bool:
    if isinstance(node, Chars):
        return node.ranges[-1][1] > 0x7F and node.ranges[0][0] != node.ranges[-1][1]
    return any(map(_has_wide_class, parts_of(node)))


def _json_options(spec: GrammarSpec) -> dict[str, bool]:
    return {"any_whitespace": spec.any_whitespace, "strict_mode": True}


class _Grammar:
    def __init__(self, library: Any, compiled: Any, end_id: int, no_text: frozenset[int], size: int) -> None:
        self._library = library
        self._compiled = compiled
        self._end_id = end_id
        self._no_text = no_text
        self._size = size
        self.num_bytes: int = compiled.memory_size_bytes

    def start(self) -> Matcher:
        return _Matcher(self._library.GrammarMatcher(self._compiled), self._end_id, self._no_text, self._size)


class _Matcher:
    __slots__ = ("_end_id", "_last_word", "_mask", "_matcher", "_no_text")

    def __init__(self, matcher: Any, end_id: int, no_text: frozenset[int], size: int) -> None:
        self._matcher = matcher
        self._end_id = end_id
        self._no_text = no_text  # tokens, which the library would warn of
        self._mask = np.empty((1, -(-size // 32)), np.int32)
        self._last_word = np.uint32(0xFFFFFFFF >> -size % 32)  # bits of tokens

    def accept(self, token_ids: Sequence[int]) -> int:
        for count, token_id in enumerate(token_ids):
            if token_id in self._no_text or not self._matcher.accept_token(token_id):
                return count
        return len(token_ids)

    def rollback(self, num_tokens: int) -> None:
        if num_tokens:
            self._matcher.rollback(num_tokens)

    def allows(self, token_id: int) -> bool:
        if not self.accept([token_id]):
            return False
        self._matcher.rollback(1)
        return True

    def forced(self) -> list[int]:
        return []  # a mask would tell, at its price

    def can_stop(self) -> bool:
        return bool(self._matcher.is_completed())

    def must_stop(self) -> bool:
        if not self.can_stop():
            return False
        self.fill(self._mask, 0)
        return not self._mask.any()

    def fill(self, masks: np.ndarray, row: int) -> None:
        """Writes the mask of the row."""
        if not self._matcher.fill_next_token_bitmask(masks, row):
            masks[row] = -1
        words = masks[row].view(np.uint32)
        words[self._end_id // 32] &= ~np.uint32(1 << self._end_id % 32)
        words[-1] &= self._last_word
