"""Context-free grammars: Lark, and GBNF or EBNF, brought into the Lark dialect of llguidance."""

from __future__ import annotations

import re

from taco.guided.first_match import first_match
from taco.guided.protocol import GrammarError
from taco.guided.regex import Node, parse_regex, write_regex

MAX_CHARS = 200_000

_GBNF_RULE = re.compile(r"^[ \t]*[A-Za-z_][\w-]*[ \t]*::=", re.MULTILINE)
# What a Lark grammar is made of, as far as it matters here: texts, comments, expressions, and the rest.
_LARK_PARTS = re.compile(
    r"""(?P<text>"(?:[^"\\\n]|\\.)*"i?)
    | (?P<comment>(?://|\#)[^\n]*)
    | (?P<regex>/(?!/)(?P<body>(?:[^/\\\n]|\\.)+)/(?P<flags>[imslux]*))
    | (?P<alias>->[ \t]*\w+)
    | (?P<rule>^[?!]+(?=\w))""",
    re.VERBOSE | re.MULTILINE,
)


def read_grammar(source: str) -> str:
    """A grammar in the dialect of llguidance; whether it is broken, the library will tell.

    Expressions mean what they mean in Python. What only shapes the tree of a parser (`?rule`, `!rule`, `-> name`) goes.

    Raises:
        GrammarError: it is too large, GBNF that is broken, or has an expression that no regular language can express.
    """
    if len(source) > MAX_CHARS:
        raise GrammarError(f"The grammar has {len(source)} characters; at most {MAX_CHARS} are compiled.")
    if "\0" in source:
        raise GrammarError("The grammar must not contain a NUL character.")
    if _GBNF_RULE.search(source):
        return _LARK_PARTS.sub(lambda part: _rewrite(part, ends_as_in_python=False), _from_gbnf(source))
    return _LARK_PARTS.sub(lambda part: _rewrite(part, ends_as_in_python=True), source)


def as_lark(node: Node) -> str:
    """An expression as a terminal of Lark."""
    return "/" + re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", write_regex(node)) + "/"


def _from_gbnf(source: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(source)
    except Exception as error:  # plain ones too
        raise GrammarError(f"The grammar is no GBNF: {error}.") from None


def _rewrite(part: re.Match[str], ends_as_in_python: bool) -> str:
    if part["regex"]:
        body = part["body"].replace(r"\/", "/")
        flags = "".join(sorted({*part["flags"]} - {"l", "u"}))
        node = parse_regex(f"(?{flags}:{body})" if flags else body)
        return as_lark(first_match(node, part["regex"][:80]) if ends_as_in_python else node)
    return part["text"] or ""
