"""Where a match of `re` ends, for small expressions and all texts over a small alphabet."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.guided.first_match import first_match
from taco.guided.protocol import GrammarError
from taco.guided.regex import num_positions, parse_regex, write_regex

TEXTS = ["".join(letters) for length in range(6) for letters in itertools.product("abc", repeat=length)]
QUANTIFIERS = ["", "", "?", "*", "+", "??", "*?", "+?", "{2}", "{1,2}", "{0,2}?", "{2,}", "{1,}?"]

_small = st.recursive(
    st.sampled_from(["a", "b", "c", "[ab]", "[^a]", "ab", "ba", "."]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(st.one_of(inner, st.just("")), min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(QUANTIFIERS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


def ends_as_in_python(pattern: str) -> bool:
    """Compares the longest matches of what `first_match` gives with what `re` finds; False if that is refused."""
    try:
        found = first_match(parse_regex(pattern), pattern)
    except GrammarError:
        return False
    written = re.compile(write_regex(found))
    for text in TEXTS:
        match = re.match(pattern, text)
        ends = [end for end in range(len(text) + 1) if written.fullmatch(text[:end])]
        assert (match.end() if match else -1) == max(ends, default=-1), (pattern, write_regex(found), text)
    return True


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(_small)
def test_the_longest_match_is_the_first_one_of_python(pattern: str) -> None:
    ends_as_in_python(pattern)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, database=None)
@given(_small)
def test_the_longest_match_is_the_first_one_of_python_for_many(pattern: str) -> None:
    ends_as_in_python(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        *("a|ab", "ab|a", "(?:a|ab)(?:c|bc)", "(?:a|ab)(?:c|bcd)c*", "a*?b", "a+?", "a??b", "a?b??", "(?:a|b|ab)+c"),
        *(
            "(?:a|ab)*c",
            "(?:ab|a)*",
            "(?:a|ab)(?:a|ab)",
            "a{1,2}?b?",
            ".*?a",
            "(?:a|ab|abc)",
            "(?:|a)b",
            "(?:a|)(?:b|)",
        ),
        *("a.*?b", "(?:a*|b)c", "(?:a|b)*?c", "(?:a{2}|a){1,2}b", "[ab]*a", "(?:ab*)+?c"),
    ],
)
def test_expressions_that_are_taken(pattern: str) -> None:
    assert ends_as_in_python(pattern)


WORDS = "|".join(sorted((f"word{i * i}" for i in range(700)), key=len, reverse=True))


@pytest.mark.parametrize(
    "pattern",
    ["(?:a|b)*", "ab?c+", "[ab]+", "(?:ab|ac)", "abc", "(?:a|b|)", "(?:[a-z]{1,9} ){1,200}x", WORDS],
    ids=lambda pattern: pattern[:30],
)
def test_what_is_not_cut_off_stays_as_it_is(pattern: str) -> None:
    node = parse_regex(pattern)
    assert first_match(node, pattern) is node


@pytest.mark.parametrize("pattern", ["(?:[ab]*a[ab]{15}c|[ab]+?)", "a{20001}?|a{1,20001}?"])
def test_what_is_too_large_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(pattern)):
        first_match(parse_regex(pattern), pattern)


@pytest.mark.parametrize("pattern", ["(?:|a)*", "(?:a*|b)+", "(?:a??)*", "(?:b|(?:|a)c?)*a"])
def test_repeating_the_empty_text_before_another_one_is_refused(pattern: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(pattern)):
        first_match(parse_regex(pattern), pattern)


def test_results_are_of_a_reasonable_size() -> None:
    assert num_positions(first_match(parse_regex("(?:ab|a|b)*?(?:abc|c)"), "")) < 100
