"""Where a match of Python's `re` ends: it takes the first alternative that leads to a match, not the longest text.

Parsers take the terminals of a grammar from a text in this way: of `a|ab` they find "a" only, and lazy quantifiers end
as early as they can. Libraries for guided decoding take the longest text. `first_match` gives an expression whose
longest matches are the first matches of another one.

The expression becomes an automaton whose states are lists of places in it, in the order in which `re` would try them
(Pike's virtual machine: Cox, "Regular expression matching: the virtual machine approach", 2009). What is in a list
after a match is never tried. Where nothing is cut off in this way, the expression stays as it is.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from taco.guided.protocol import GrammarError
from taco.guided.regex import Chars, Concat, Either, Node, Ranges, Repeat, num_positions, parts_of

MAX_POSITIONS = 20_000
MAX_VISITS = 1_000_000  # of places, while an automaton is made: about a second
MAX_STATES = 400  # of an automaton from which an expression is made
MAX_RESULT = 20_000  # positions of the expression that comes out

_ACCEPT = -1
_States = tuple[int, ...]


def first_match(node: Node, shown: str) -> Node:
    """An expression whose longest match is the first match of another one, in any text.

    Args:
        node: the other expression.
        shown: how to name it in an error.

    Raises:
        GrammarError: the expression is too large to tell.
    """
    if _ends_plainly(node):
        return node
    automaton = _automaton(node)
    if automaton is None:
        raise GrammarError(
            f"The expression {shown} is too large to tell where its matches end; put longer alternatives before "
            "shorter ones that they begin with, and avoid lazy quantifiers."
        )
    edges, final, is_cut = automaton
    # `re` has rules of its own for what repeats the empty text.
    is_odd = _repeats_nothing(node) and (is_cut or _prefers_nothing(node))
    if not is_cut and not is_odd:
        return node
    found = None if is_odd or len(edges) > MAX_STATES else _as_expression(edges, final)
    if found is None or num_positions(found) > MAX_RESULT:
        raise GrammarError(
            f"The expression {shown} has lazy quantifiers, or alternatives that begin with earlier ones, in a way that "
            "cannot be enforced; put longer alternatives first, and name the characters that may be within."
        )
    return found


def _ends_plainly(node: Node) -> bool:
    """Whether the longest match is the first one as can be seen at once."""
    if isinstance(node, Concat):
        return all(isinstance(part, Chars) for part in node.parts[:-1]) and all(map(_ends_plainly, node.parts[-1:]))
    if isinstance(node, Repeat):
        return isinstance(node.part, Chars) and not node.is_lazy
    return isinstance(node, Chars)


def _prefers_nothing(node: Node) -> bool:
    """Whether the empty text may be tried before another one: by a lazy quantifier, or as an earlier alternative."""
    if isinstance(node, Repeat) and node.is_lazy:
        return True
    if isinstance(node, Either) and any(map(_may_be_empty, node.options[:-1])):
        return True
    return any(map(_prefers_nothing, parts_of(node)))


def _repeats_nothing(node: Node) -> bool:
    """Whether the empty text may come any number of times."""
    if isinstance(node, Repeat) and node.most is None and _may_be_empty(node.part):
        return True
    return any(map(_repeats_nothing, parts_of(node)))


def _may_be_empty(node: Node) -> bool:
    if isinstance(node, Repeat):
        return node.least == 0 or _may_be_empty(node.part)
    return not isinstance(node, Chars) and (all if isinstance(node, Concat) else any)(
        map(_may_be_empty, parts_of(node))
    )


class _Program:
    """The expression as places: at one a character is taken, from another one others are tried in order."""

    def __init__(self, node: Node) -> None:
        self.chars: dict[int, Chars] = {}  # what is taken at a place
        self.after: dict[int, int] = {}  # where it goes on then
        self.branches: dict[int, list[int]] = {}
        self._num_places = 0
        self.num_visits = 0
        self.start = self._add(node, _ACCEPT)

    def _place(self) -> int:
        self._num_places += 1
        return self._num_places

    def _add(self, node: Node, after: int) -> int:
        """Adds a node that goes on at `after`; returns where it begins."""
        if isinstance(node, Chars):
            place = self._place()
            self.chars[place], self.after[place] = node, after
            return place
        if isinstance(node, Concat):
            for part in reversed(node.parts):
                after = self._add(part, after)
            return after
        if isinstance(node, Either):
            place = self._place()
            self.branches[place] = [self._add(option, after) for option in node.options]
            return place
        begin = after
        if node.most is None:
            begin = self._place()
            self.branches[begin] = self._in_order(node, self._add(node.part, begin), after)
        else:
            for _ in range(node.most - node.least):
                place = self._place()
                self.branches[place] = self._in_order(node, self._add(node.part, begin), after)
                begin = place
        for _ in range(node.least):
            begin = self._add(node.part, begin)
        return begin

    def _in_order(self, node: Repeat, inner: int, after: int) -> list[int]:
        return [after, inner] if node.is_lazy else [inner, after]

    def closure(self, places: Iterable[int]) -> tuple[_States, bool]:
        """The places that take a character or accept, in order, up to the one that accepts; whether any came later."""
        found: list[int] = []
        seen: set[int] = set()
        waiting = list(places)[::-1]
        while waiting:
            place = waiting.pop()
            self.num_visits += 1
            if place in seen:
                continue
            seen.add(place)
            if place in self.branches:
                waiting.extend(reversed(self.branches[place]))
            else:
                found.append(place)
        end = found.index(_ACCEPT) + 1 if _ACCEPT in found else len(found)
        return tuple(found[:end]), end < len(found)


def _automaton(node: Node) -> tuple[list[dict[int, Ranges]], set[int], bool] | None:
    """Transitions of each state, the states that accept, and whether anything was cut off; None if it is too large."""
    if num_positions(node) > MAX_POSITIONS:
        return None
    program = _Program(node)
    classes = _classes(program.chars.values())
    first, is_cut = program.closure([program.start])
    numbers = {first: 0}
    waiting = [first]
    edges: list[dict[int, Ranges]] = [{}]
    while waiting:
        state = waiting.pop()
        for members, ranges in classes.items():
            if program.num_visits > MAX_VISITS:
                return None
            after, cuts = program.closure(
                program.after[place] for place in state if place != _ACCEPT and id(program.chars[place]) in members
            )
            program.num_visits += len(state)
            is_cut |= cuts
            if not after:
                continue
            if after not in numbers:
                numbers[after] = len(numbers)
                waiting.append(after)
                edges.append({})
            known = edges[numbers[state]].get(numbers[after], ())
            edges[numbers[state]][numbers[after]] = _union(known, ranges)
    return edges, {number for state, number in numbers.items() if _ACCEPT in state}, is_cut


def _classes(nodes: Iterable[Chars]) -> dict[frozenset[int], Ranges]:
    """The characters that the same nodes hold, by the ids of these nodes."""
    unique = {id(node): node for node in nodes}
    starts = sorted({edge for node in unique.values() for low, high in node.ranges for edge in (low, high + 1)})
    members: list[set[int]] = [set() for _ in starts]
    for key, node in unique.items():
        for low, high in node.ranges:
            for index in range(bisect.bisect_left(starts, low), bisect.bisect_left(starts, high + 1)):
                members[index].add(key)
    classes: dict[frozenset[int], list[tuple[int, int]]] = {}
    for start, end, keys in zip(starts, starts[1:], members, strict=False):
        if keys:
            classes.setdefault(frozenset(keys), []).append((start, end - 1))
    return {keys: tuple(ranges) for keys, ranges in classes.items()}


def _union(a: Ranges, b: Ranges) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted((*a, *b)):
        if merged and low == merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return tuple(merged)


def _as_expression(edges: Sequence[dict[int, Ranges]], final: set[int]) -> Node | None:
    """The texts that lead from state 0 to one in `final`, found by taking out states; None if it gets too large."""
    begin, end = -1, -2
    arrows: dict[int, dict[int, Node]] = {begin: {0: Concat(())}}
    for state, by_chars in enumerate(edges):
        arrows[state] = {target: Chars(ranges) for target, ranges in by_chars.items()}
        if state in final:
            arrows[state][end] = Concat(())
    while len(arrows) > 1:
        state = min(
            (one for one in arrows if one != begin),
            key=lambda one: (sum(one in targets for targets in arrows.values()) * len(arrows[one]), one),
        )
        targets = arrows.pop(state)
        loop = targets.pop(state, None)
        around = [] if loop is None else [Repeat(loop, 0, None)]
        for others in arrows.values():
            into = others.pop(state, None)
            if into is None:
                continue
            for target, onwards in targets.items():
                way = _in_a_row([into, *around, onwards])
                others[target] = _one_of(others[target], way) if target in others else way
                if num_positions(others[target]) > MAX_RESULT:
                    return None
    return arrows[begin].get(end)


def _in_a_row(parts: Iterable[Node]) -> Node:
    flat = [one for part in parts for one in (part.parts if isinstance(part, Concat) else (part,))]
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def _one_of(a: Node, b: Node) -> Node:
    if isinstance(a, Chars) and isinstance(b, Chars):
        return Chars(_union(a.ranges, b.ranges))
    options = [one for part in (a, b) for one in (part.options if isinstance(part, Either) else (part,))]
    return Either(tuple(options))
