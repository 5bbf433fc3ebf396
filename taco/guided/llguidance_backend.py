"""Guided decoding through llguidance: lazy, so that grammars compile in milliseconds, and wide in what it knows."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from taco.guided.choices import read_choices
from taco.guided.enforcement import NormalSchema
from taco.guided.grammars import read_grammar
from taco.guided.protocol import CompiledGrammar, GrammarError, Matcher
from taco.guided.regex import either, num_positions, parse_regex, parse_whitespace, write_regex
from taco.guided.schema import read_schema
from taco.guided.spec import GrammarKind, GrammarSpec
from taco.guided.structural_tags import read_structural_tag
from taco.guided.vocabulary import Vocabulary

if TYPE_CHECKING:
    import llguidance

# Sets of tokens whose masks the library takes as a whole where a string may go on by any of them. Its own have fewer
# lengths; with these a mask within a string of bounded length takes three quarters of the time.
_IN_STRINGS = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [r"[\x20\x0A\x0D\x09]+", *(_IN_STRINGS + f"{{1,{n}}}" for n in (2, 4, 6, 8, 10, 15, 30)), _IN_STRINGS + "+"]


_MAX_POSITIONS = 200_000
_MAX_SHALLOW = 10_000  # characters of a grammar, whose rules then are not nested too deep for the stack of any thread
# Characters of a grammar that is made when it is checked. Regular expressions of that length can take seconds, schemas
# take a few milliseconds in ten thousand characters.
_MAX_AT_ONCE = 10_000
_MAX_SCHEMA_AT_ONCE = 100_000
_DEEP_STACK_BYTES = 512 << 20  # of which no more is used than needed
_stack_size_lock = threading.Lock()

_MAX_ITEMS = 50_000  # ways on at one place: a few for each optional property that may come next

_MAX_ENCODED = 256  # characters of a forced text whose tokens are found
_MAX_UNSURE = 16  # tokens at the end of a text, which might be others if the text went on
_MAX_FORCED = 64  # tokens that are found at a time


class LLGuidanceBackend:
    """See `taco.guided.protocol.Backend`.

    Args:
        vocabulary: of the model.
        num_threads: that fill masks at the same time.

    Raises:
        GrammarError: the package is not installed.
    """

    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary, num_threads: int = 1) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise GrammarError(
                f'The backend "llguidance" of guided decoding needs its package: pip install llguidance ({error}).'
            ) from error
        self._vocabulary = vocabulary
        self._tokenizer = llguidance.LLTokenizer(cast(Any, _Tokenizer(vocabulary)), slices=_SLICES)
        self._executor = llguidance.LLExecutor(num_threads)
        self._limits = llguidance.LLParserLimits(verbose_errors=False, max_items_in_row=_MAX_ITEMS)
        self._matcher_class = llguidance.LLMatcher

    def check(self, spec: GrammarSpec) -> CompiledGrammar | None:
        grammar, schema = self._read(spec)
        is_quick = len(grammar) <= (_MAX_AT_ONCE if schema is None else _MAX_SCHEMA_AT_ONCE)
        return self._make(grammar, schema) if is_quick else None

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        return self._make(*self._read(spec))

    def _read(self, spec: GrammarSpec) -> tuple[str, NormalSchema | None]:
        """A constraint in the library's own notation, and its schema if it is one."""
        if spec.kind is not GrammarKind.JSON:
            return self._grammar(spec), None
        schema = self._read_schema(spec.source, spec)
        options = cast(Any, _json_options(spec))
        return self._matcher_class.grammar_from_json_schema(json.dumps(schema.root), overrides=options), schema

    def _make(self, grammar: str, schema: NormalSchema | None) -> CompiledGrammar:
        template = self._make_template(grammar) if len(grammar) <= _MAX_SHALLOW else self._make_deep_template(grammar)
        if template.is_error():
            message = _plain(template.get_error())
            raise GrammarError(f"llguidance: {message}") if schema is None else schema.explain(message)
        if schema is not None and template.is_accepting():
            # No JSON is the empty text: the library has found no number between such bounds, and says nothing.
            raise GrammarError(
                "The JSON schema has bounds of numbers (minimum, maximum, exclusiveMinimum, exclusiveMaximum, "
                "multipleOf) that are too close together."
            )
        return _Grammar(template, len(grammar))

    def _make_template(self, grammar: str) -> llguidance.LLMatcher:
        template = self._matcher_class(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if not template.is_error():
            template.compute_bitmask()  # does what later masks share
        return template

    def _make_deep_template(self, grammar: str) -> llguidance.LLMatcher:
        """As `_make_template`, with a large stack: the library follows rules by recursion."""
        made: Future[llguidance.LLMatcher] = Future()

        def make() -> None:
            try:
                made.set_result(self._make_template(grammar))
            except BaseException as error:  # a panic of Rust is no Exception
                made.set_exception(error)

        with _stack_size_lock:
            previous = threading.stack_size(_DEEP_STACK_BYTES)
            try:
                threading.Thread(target=make, name="taco-deep-grammar").start()
            finally:
                threading.stack_size(previous)
        return made.result()

    def fill_masks(self, matchers: Sequence[Matcher], masks: np.ndarray) -> list[str | None]:
        own = [cast(_Matcher, matcher).matcher for matcher in matchers]
        pairs = [(matcher, row) for row, matcher in enumerate(own)]
        self._executor.unsafe_compute_mask_ptr(pairs, masks.ctypes.data, masks.shape[1] * 4, masks.shape[0])
        problems: list[str | None] = [None] * len(own)
        for row, matcher in enumerate(own):
            if matcher.is_error():
                problems[row] = f"llguidance: {_plain(matcher.get_error())}"
                masks[row] = 0
        return problems

    def _grammar(self, spec: GrammarSpec) -> str:
        """A constraint other than a JSON schema in the library's own notation."""
        if spec.kind is GrammarKind.REGEX:
            node = parse_regex(spec.source)
            if (size := num_positions(node)) > _MAX_POSITIONS:
                raise GrammarError(
                    f"The regular expression has {size} characters once repetition is written out; at most "
                    f"{_MAX_POSITIONS} can be enforced."
                )
            return self._matcher_class.grammar_from_regex(write_regex(node))
        if spec.kind is GrammarKind.CHOICE:
            return self._matcher_class.grammar_from_regex(write_regex(either(read_choices(spec.source))))
        if spec.kind is GrammarKind.GRAMMAR:
            return self._matcher_class.grammar_from_lark(
                read_grammar(spec.source, lambda schema: self._json_rule(schema, spec))
            )
        return self._matcher_class.grammar_from_lark(
            read_structural_tag(spec.source, lambda schema: self._json_rule(schema, spec))
        )

    def _read_schema(self, source: str, spec: GrammarSpec) -> NormalSchema:
        schema = read_schema(source, spec.additional_properties)
        schema.refuse_unless_enforced(self.name)
        return schema

    def _json_rule(self, schema: Any, spec: GrammarSpec) -> str:
        """A JSON schema inside a grammar."""
        normal = self._read_schema(json.dumps(schema), spec)
        return "%json " + json.dumps({"x-guidance": _json_options(spec), **normal.root})


def _plain(message: str) -> str:
    """What the library says of an error, without its own state."""
    if message.startswith("NoExtensionBias"):
        return "no text matches it, or none that the tokens of the model can write"
    return message.partition("<non-verbose/>")[0].partition("<state>")[0].partition("<backtrace>")[0].strip()


def _json_options(spec: GrammarSpec) -> dict[str, Any]:
    # Without \u there is one way only to write a property's name, so that no name can come again in disguise.
    options: dict[str, Any] = {"whitespace_flexible": spec.any_whitespace, "json_allowed_escapes": 'nrbtf\\"'}
    if spec.whitespace_pattern is not None:
        options["whitespace_pattern"] = write_regex(parse_whitespace(spec.whitespace_pattern))
    return options


class _Tokenizer:
    """The vocabulary with the names that `llguidance.LLTokenizer` asks for."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        special = vocabulary.special_tokens
        self.eos_token_id = _end_token(vocabulary)
        self.special_token_ids = sorted({*special, self.eos_token_id})
        self.tokens = list(vocabulary.tokens)
        for token_id in self.special_token_ids:
            self.tokens[token_id] = special.get(token_id, f"<|no text {token_id}|>").encode()
        self._id_of_byte = [vocabulary.ids_of_bytes.get(bytes([byte]), [-1])[0] for byte in range(256)]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        if len(text) <= _MAX_ENCODED or -1 in self._id_of_byte:
            return self._vocabulary.encode(text)
        # Of a long text only the first tokens are looked at, and again at each of them: the rest need not be canonical.
        start = self._vocabulary.encode(text[:_MAX_ENCODED])[:-_MAX_UNSURE]
        num_bytes = sum(len(self._vocabulary.tokens[token_id]) for token_id in start)
        return start + [self._id_of_byte[byte] for byte in text.encode()[num_bytes:]]


def _end_token(vocabulary: Vocabulary) -> int:
    """A token that is no text, which stands for the end of the output in the library."""
    for token_id in (*vocabulary.eos_token_ids, *vocabulary.special_tokens):
        return token_id
    for token_id, piece in enumerate(vocabulary.tokens):
        if not piece:
            return token_id
    raise GrammarError("Guided decoding needs a tokenizer with an end-of-sequence token, and this one has none.")


class _Grammar:
    def __init__(self, template: llguidance.LLMatcher, num_chars: int) -> None:
        self._template = template
        self.num_bytes = (1 << 20) + 16 * num_chars

    def start(self) -> Matcher:
        return _Matcher(self._template.deep_copy())


class _Matcher:
    __slots__ = ("is_free", "matcher")

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher
        self.is_free = False  # whether nothing is known to be forced here

    def accept(self, token_ids: Sequence[int]) -> int:
        self.is_free = False
        return self.matcher.try_consume_tokens(list(token_ids))

    def rollback(self, num_tokens: int) -> None:
        self.is_free = False
        self.matcher.rollback(num_tokens)

    def allows(self, token_id: int) -> bool:
        # Where a text is forced, the mask has the token alone in which the tokenizer would write it, although the
        # library takes others as well.
        if not self.is_free:
            if forced := self.matcher.compute_ff_tokens():
                return token_id == forced[0]
            self.is_free = True
        return self.matcher.validate_tokens([token_id]) == 1

    def forced(self) -> list[int]:
        # The mask has one bit where the library forces a token, and each place depends on the token before it.
        matcher = self.matcher
        forced: list[int] = []
        while len(forced) < _MAX_FORCED and (found := matcher.compute_ff_tokens()):
            if not matcher.try_consume_tokens(found[:1]):
                break
            forced.append(found[0])
        if forced:
            matcher.rollback(len(forced))
        self.is_free = not forced
        return forced

    def can_stop(self) -> bool:
        return self.matcher.is_accepting()

    def must_stop(self) -> bool:
        return self.matcher.is_stopped() and not self.matcher.is_error()
