"""Regular expressions as Python reads them, brought into a form that every library reads in the same way.

Python's own parser reads the expression, and Python's own engine says which characters a class holds, so that `\\d`,
`\\w`, `(?i)` and the like mean what they mean in `re`. What is written out again has literals, classes as ranges of
characters, alternatives and repetition, nothing else. What regular languages cannot express is refused by name.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from taco.guided.protocol import GrammarError

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MAX_CHARS = 200_000  # of an expression: parsing it then takes some tenths of a second
MAX_REPEATS = 1_000_000
_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends included, ascending, without surrogates


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Concat:
    """One part after the other; the empty text if there is none."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """One of the options; there is at least one."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A part `least` to `most` times; any number of times from `least` on if `most` is None.

    Lazy repetition matches the same texts; `re` tries the shorter ones first.
    """

    part: Node
    least: int
    most: int | None
    is_lazy: bool = False


Node = Chars | Concat | Either | Repeat

EMPTY = Concat(())
ANY_CHAR = Chars(((0, 0xD7FF), (0xE000, _LAST)))
ANY_TEXT = Repeat(ANY_CHAR, 0, None)
_LINE_END = Repeat(Chars(((0x0A, 0x0A),)), 0, 1)
JSON_SPACE = (0x20, 0x09, 0x0A, 0x0D)


def parse_regex(pattern: str) -> Node:
    """The texts that `re.fullmatch` accepts.

    Raises:
        GrammarError: the expression is broken, matches nothing, or uses what a regular language cannot express.
    """
    return _checked(_Reader(pattern, _python_class, search=False).read(), pattern)


def parse_json_pattern(pattern: str) -> Node:
    """The texts in which `pattern` of a JSON schema is found, both by ECMA 262 and by Python's `re.search`.

    Where the two differ (digits beyond ASCII, white space, line ends), what both accept.

    Raises:
        GrammarError: as `parse_regex`.
    """
    return _checked(_Reader(pattern, _json_class, search=True).read(), pattern)


def parse_name_pattern(pattern: str) -> Node:
    """The texts in which Python's `re.search` finds `pattern`, all of them: what a schema says of such names.

    Raises:
        GrammarError: as `parse_regex`.
    """
    return _checked(_Reader(pattern, _python_class, search=True, dollar_takes_line_end=True).read(), pattern)


def parse_whitespace(pattern: str) -> Node:
    """The white space of JSON that `re.fullmatch` accepts.

    Raises:
        GrammarError: as `parse_regex`, or the pattern asks for other characters.
    """
    node = restrict(_Reader(pattern, _python_class, search=False).read(), JSON_SPACE)
    if is_void(node):
        raise GrammarError(
            f"whitespace_pattern={pattern!r} matches no white space of JSON, which is blanks, tabs and line ends."
        )
    return node


def literal(text: str) -> Node:
    """That text alone.

    Raises:
        GrammarError: it has halves of surrogate pairs, which cannot be written in UTF-8.
    """
    if any(_SURROGATES[0] <= ord(char) <= _SURROGATES[1] for char in text):
        raise GrammarError(f"{text!r} has half a surrogate pair, which no text can have.")
    return Concat(tuple(Chars(((ord(char), ord(char)),)) for char in text))


def either(texts: Iterable[str]) -> Node:
    """One of some texts; there is at least one.

    Raises:
        GrammarError: as `literal`.
    """
    options = tuple(map(literal, texts))
    return options[0] if len(options) == 1 else Either(options)


def parts_of(node: Node) -> tuple[Node, ...]:
    """The nodes that it is made of."""
    if isinstance(node, Concat):
        return node.parts
    if isinstance(node, Either):
        return node.options
    return (node.part,) if isinstance(node, Repeat) else ()


def is_void(node: Node) -> bool:
    """Whether no text matches."""
    if isinstance(node, Chars):
        return not node.ranges
    if isinstance(node, Concat):
        return any(map(is_void, node.parts))
    if isinstance(node, Either):
        return all(map(is_void, node.options))
    return node.least > 0 and is_void(node.part)


def restrict(node: Node, alphabet: Iterable[int]) -> Node:
    """The texts of a node that are made of some characters only."""
    if isinstance(node, Chars):
        kept = sorted(code for code in alphabet if any(low <= code <= high for low, high in node.ranges))
        return Chars(tuple((code, code) for code in kept))
    if isinstance(node, Concat):
        return Concat(tuple(restrict(part, alphabet) for part in node.parts))
    if isinstance(node, Either):
        return Either(tuple(restrict(option, alphabet) for option in node.options))
    return replace(node, part=restrict(node.part, alphabet))


def without_chars(node: Node, ranges: Ranges) -> Node:
    """The texts of a node that have none of some characters.

    Raises:
        GrammarError: there are none.
    """
    kept = _subtract_chars(node, ranges)
    if is_void(kept):
        raise GrammarError(f"The constraint needs characters like {chr(ranges[0][0])!r}, which cannot be written.")
    return _without_voids(kept)


def _subtract_chars(node: Node, ranges: Ranges) -> Node:
    if isinstance(node, Chars):
        return Chars(_subtract(node.ranges, ranges))
    if isinstance(node, Concat):
        return Concat(tuple(_subtract_chars(part, ranges) for part in node.parts))
    if isinstance(node, Either):
        return Either(tuple(_subtract_chars(option, ranges) for option in node.options))
    return replace(node, part=_subtract_chars(node.part, ranges))


def num_positions(node: Node) -> int:
    """How many classes of characters it has once repetitions are written out: what automata grow with."""
    if isinstance(node, Chars):
        return 1
    if isinstance(node, Concat):
        return sum(map(num_positions, node.parts))
    if isinstance(node, Either):
        return sum(map(num_positions, node.options))
    return num_positions(node.part) * max(1, node.least if node.most is None else node.most)


def write_regex(node: Node) -> str:
    """The expression in the syntax that the regex libraries share: to be matched as a whole, without anchors."""
    if isinstance(node, Chars):
        return _write_class(node.ranges)
    if isinstance(node, Concat):
        return "".join(f"(?:{write_regex(p)})" if isinstance(p, Either) else write_regex(p) for p in node.parts)
    if isinstance(node, Either):
        return "|".join(map(write_regex, node.options))
    inner = write_regex(node.part)
    if not isinstance(node.part, Chars):
        inner = f"(?:{inner})"
    if (node.least, node.most) in _SHORT_REPEATS:
        return inner + _SHORT_REPEATS[node.least, node.most]
    if node.least == node.most:
        return f"{inner}{{{node.least}}}"
    return f"{inner}{{{node.least},{'' if node.most is None else node.most}}}"


_SHORT_REPEATS = {(0, None): "*", (1, None): "+", (0, 1): "?"}


def _write_class(ranges: Ranges) -> str:
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _write_char(ranges[0][0])
    if not ranges:
        raise GrammarError("A class of characters is empty.")
    written = (_write_char(low) if low == high else f"{_write_char(low)}-{_write_char(high)}" for low, high in ranges)
    return f"[{''.join(written)}]"


def _write_char(code: int) -> str:
    char = chr(code)
    if char.isascii() and char.isprintable():
        return char if char.isalnum() or char in " _<>=!@%,;:'\"`" else f"\\{char}"
    return f"\\u{code:04x}" if code < 0x80 else char  # some libraries read more digits after \\x than two


def _checked(node: Node, pattern: str) -> Node:
    if is_void(node):
        raise GrammarError(f"No text matches the regular expression {_shown(pattern)}.")
    return _without_voids(node)


def _without_voids(node: Node) -> Node:
    """The same texts, without classes that hold no character."""
    if isinstance(node, Concat):
        return Concat(tuple(map(_without_voids, node.parts)))
    if isinstance(node, Either):
        options = tuple(_without_voids(option) for option in node.options if not is_void(option))
        return options[0] if len(options) == 1 else Either(options)
    if isinstance(node, Repeat):
        return EMPTY if is_void(node.part) else replace(node, part=_without_voids(node.part))
    return node


def _shown(pattern: str) -> str:
    return repr(pattern) if len(pattern) <= 80 else f"{pattern[:80]!r}..."


# Characters


@lru_cache(maxsize=1)
def _all_chars() -> str:
    return "".join(map(chr, (*range(_SURROGATES[0]), *range(_SURROGATES[1] + 1, _LAST + 1))))


@lru_cache(maxsize=1024)
def _python_class(source: str, flags: int) -> Ranges:
    """The characters that an expression for one character matches, by asking `re` about each."""
    ranges: list[tuple[int, int]] = []
    gap = _SURROGATES[1] + 1 - _SURROGATES[0]
    for match in re.finditer(f"{source}+", _all_chars(), flags):
        low, end = match.span()
        if low < _SURROGATES[0] < end:
            ranges.append((low, _SURROGATES[0] - 1))
            low = _SURROGATES[0]
        shift = gap if low >= _SURROGATES[0] else 0
        ranges.append((low + shift, end - 1 + shift))
    return tuple(ranges)


_ECMA_LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))


@lru_cache(maxsize=1024)
def _json_class(source: str, flags: int) -> Ranges:
    """As `_python_class`, of the characters that ECMA 262 means too."""
    ranges = _python_class(source, flags)
    if source == ".":
        return _subtract(ranges, _ECMA_LINE_ENDS)
    if "\\" in source:  # of \d and \w it takes ASCII only; where they are excluded, they stay excluded as Python has it
        return _subtract(ranges, _subtract(ANY_CHAR.ranges, _python_class(source, flags | re.ASCII)))
    return ranges


def _subtract(ranges: Ranges, holes: Ranges) -> Ranges:
    kept: list[tuple[int, int]] = []
    for low, high in ranges:
        for hole_low, hole_high in holes:
            if hole_high < low:
                continue
            if hole_low > high:
                break
            if hole_low > low:
                kept.append((low, hole_low - 1))
            low = hole_high + 1
        if low <= high:
            kept.append((low, high))
    return tuple(kept)


# Expressions


class _Anchor(Exception):
    """An anchor stands where it cannot be resolved."""


_NOT_REGULAR = {
    "ASSERT": "lookahead or lookbehind, (?=...) or (?<=...)",
    "ASSERT_NOT": "negative lookahead or lookbehind, (?!...) or (?<!...)",
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a conditional group, (?(1)...)",
    "ATOMIC_GROUP": "an atomic group, (?>...)",
    "POSSESSIVE_REPEAT": "a possessive quantifier such as *+",
}
_CATEGORIES = {
    "CATEGORY_DIGIT": "\\d",
    "CATEGORY_NOT_DIGIT": "\\D",
    "CATEGORY_SPACE": "\\s",
    "CATEGORY_NOT_SPACE": "\\S",
    "CATEGORY_WORD": "\\w",
    "CATEGORY_NOT_WORD": "\\W",
}
_BEGIN = ("AT_BEGINNING", "AT_BEGINNING_STRING")
_END = ("AT_END", "AT_END_STRING")


class _Reader:
    """Turns what Python's parser makes of one pattern into nodes.

    Args:
        pattern: the expression.
        class_of: the characters of an expression for one character, given its flags.
        search: it need not match the whole text but a part of it.
        dollar_takes_line_end: "$" holds before a line end at the end of the text, too, as Python has it.
    """

    def __init__(
        self,
        pattern: str,
        class_of: Callable[[str, int], Ranges],
        search: bool,
        dollar_takes_line_end: bool = False,
    ) -> None:
        self._pattern = pattern
        self._class_of = class_of
        self._around = ANY_TEXT if search else EMPTY
        self._after_dollar = _LINE_END if dollar_takes_line_end else EMPTY

    def read(self) -> Node:
        if len(self._pattern) > MAX_CHARS:
            raise GrammarError(
                f"The regular expression {_shown(self._pattern)} has {len(self._pattern)} characters; "
                f"at most {MAX_CHARS} can be compiled."
            )
        if "\0" in self._pattern:
            raise self._refuse("a NUL character")
        try:
            parsed = _parser.parse(self._pattern)
            return self._sequence(list(parsed), parsed.state.flags, True, True)
        except re.error as error:
            raise GrammarError(f"{_shown(self._pattern)} is no regular expression: {error}.") from None
        except (RecursionError, OverflowError):
            raise self._refuse("too deep a nesting, or too large a number") from None
        except _Anchor:
            raise self._refuse("^ or $ elsewhere than at the ends of the text") from None

    def _refuse(self, what: str) -> GrammarError:
        return GrammarError(f"The regular expression {_shown(self._pattern)} has {what}, which cannot be enforced.")

    def _sequence(self, items: Sequence[tuple[Any, Any]], flags: int, at_start: bool, at_end: bool) -> Node:
        """Nodes for parts in a row; the row takes in what surrounds a match, where it stands at an end of the text."""
        first, end = 0, len(items)
        while at_start and first < end and self._is_anchor(items[first], _BEGIN, flags):
            first += 1
        while at_end and first < end and self._is_anchor(items[end - 1], _END, flags):
            end -= 1
        starts_open = at_start and first == 0
        ends_open = at_end and end == len(items)
        after = self._around if ends_open else EMPTY
        if end < len(items) and all(str(position) == "AT_END" for _, position in items[end:]):
            after = self._after_dollar
        if first == end:
            return self._around if starts_open else after
        # Where an alternative has an anchor, each takes in its own surroundings.
        starts_inside = starts_open and _has_anchor(items[first])
        ends_inside = ends_open and _has_anchor(items[end - 1])
        parts = [
            self._item(items[index], flags, starts_inside and index == first, ends_inside and index == end - 1)
            for index in range(first, end)
        ]
        if starts_open and not starts_inside:
            parts.insert(0, self._around)
        if not ends_inside:
            parts.append(after)
        return _concat(parts)

    def _is_anchor(self, item: tuple[Any, Any], names: tuple[str, ...], flags: int) -> bool:
        if str(item[0]) != "AT" or str(item[1]) not in names:
            return False
        if flags & re.MULTILINE and str(item[1]) in ("AT_BEGINNING", "AT_END"):
            raise self._refuse("^ or $ under (?m), which stands for the ends of lines")
        return True

    def _item(self, item: tuple[Any, Any], flags: int, at_start: bool, at_end: bool) -> Node:
        name, value = str(item[0]), item[1]
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._chars(name, value, flags)
        if name == "BRANCH":
            return Either(tuple(self._sequence(list(option), flags, at_start, at_end) for option in value[1]))
        if name == "SUBPATTERN":
            _, added, removed, inner = value
            return self._sequence(list(inner), (flags | added) & ~removed, at_start, at_end)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = value
            bound = None if most == _parser.MAXREPEAT else int(most)
            if max(least, bound or 0) > MAX_REPEATS:
                raise self._refuse(f"a repetition beyond {MAX_REPEATS}")
            part = self._sequence(list(inner), flags, False, False)
            if bound == 0 or part == EMPTY:
                return EMPTY
            return part if (least, bound) == (1, 1) else Repeat(part, int(least), bound, name == "MIN_REPEAT")
        if name == "AT":
            if str(value) in (*_BEGIN, *_END):
                raise _Anchor
            raise self._refuse("a word boundary, \\b or \\B")
        raise self._refuse(_NOT_REGULAR.get(name, name))

    def _chars(self, name: str, value: Any, flags: int) -> Node:
        flags &= re.IGNORECASE | re.ASCII | re.DOTALL
        if name == "LITERAL" and not flags & re.IGNORECASE:
            return Chars(_merge([(value, value)]))
        if name == "IN" and not flags & re.IGNORECASE and all(str(op) in ("LITERAL", "RANGE") for op, _ in value):
            return Chars(_merge([(arg, arg) if str(op) == "LITERAL" else tuple(arg) for op, arg in value]))
        if name == "ANY":
            return Chars(self._class_of(".", flags))
        if name != "IN":
            value = [*([("NEGATE", None)] if name == "NOT_LITERAL" else []), ("LITERAL", value)]
        return Chars(self._class_of(f"[{''.join(_class_item(str(op), arg) for op, arg in value)}]", flags))


def _has_anchor(item: tuple[Any, Any]) -> bool:
    """Whether an anchor is at some depth in it, outside repetition."""
    name, value = str(item[0]), item[1]
    if name == "AT":
        return str(value) in (*_BEGIN, *_END)
    if name == "BRANCH":
        return any(_has_anchor(part) for option in value[1] for part in option)
    return name == "SUBPATTERN" and any(map(_has_anchor, value[3]))


def _class_item(op: str, arg: Any) -> str:
    if op == "NEGATE":
        return "^"
    if op == "LITERAL":
        return f"\\U{arg:08x}"
    if op == "RANGE":
        return f"\\U{arg[0]:08x}-\\U{arg[1]:08x}"
    return _CATEGORIES[str(arg)]


def _merge(ranges: Iterable[Any]) -> Ranges:
    """In order, without overlaps and surrogates."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return _subtract(tuple(merged), (_SURROGATES,))


def _concat(parts: Iterable[Node]) -> Node:
    flat: list[Node] = []
    for part in parts:
        if isinstance(part, Concat):
            flat.extend(part.parts)
        else:
            flat.append(part)
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))
