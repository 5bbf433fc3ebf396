"""Context-free grammars: Lark, and GBNF or EBNF, brought into the Lark dialect of llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

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
    | (?P<import>%import[ \t][^\n]*?(?=[ \t]*(?://|\#|\r?\n|\Z)))
    | (?P<embedded>%(?P<notation>json|regex|llguidance)\b\s*)
    | (?P<alias>->[ \t]*\w+)
    | (?P<rule>^[?!]+(?=\w))""",
    re.VERBOSE | re.MULTILINE,
)

_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|.)")
# Behind other characters a backslash is one.
_ESCAPED = {"n": "\n", "f": "\f", "t": "\t", "r": "\r", "\\": "\\", '"': '"'}


def read_grammar(source: str, json_rule: Callable[[Any], str]) -> str:
    """A grammar in the dialect of llguidance; whether it is broken, the library will tell.

    Expressions mean what they mean in Python. What only shapes the tree of a parser (`?rule`, `!rule`, `-> name`) goes.

    Args:
        json_rule: from a JSON schema to what stands for it in the grammar.

    Raises:
        GrammarError: it is too large, GBNF that is broken, or has an expression that no regular language can express
            or a JSON schema that cannot be enforced.
    """
    if len(source) > MAX_CHARS:
        raise GrammarError(f"The grammar has {len(source)} characters; at most {MAX_CHARS} are compiled.")
    if "\0" in source:
        raise GrammarError("The grammar must not contain a NUL character.")
    if _GBNF_RULE.search(source):
        return _rewritten(_from_gbnf(source), json_rule, ends_as_in_python=False)
    written = _rewritten(source, json_rule, ends_as_in_python=True)
    return re.sub(r"\n\s*\n", "\n", written)  # the library wants the options of a rule without empty lines between


def as_lark(node: Node) -> str:
    """An expression as a terminal of Lark."""
    return "/" + re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", write_regex(node)) + "/"


def _from_gbnf(source: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(source)
    except Exception as error:  # plain ones too
        raise GrammarError(f"The grammar is no GBNF: {error}.") from None


def _rewritten(source: str, json_rule: Callable[[Any], str], ends_as_in_python: bool) -> str:
    written = []
    position = 0
    while part := _LARK_PARTS.search(source, position):
        written.append(source[position : part.start()])
        position = part.end()
        if part["embedded"]:
            try:
                value, position = json.JSONDecoder().raw_decode(source, position)
            except (ValueError, RecursionError) as error:
                raise GrammarError(f"The grammar has %{part['notation']} without valid JSON: {error}.") from None
            is_schema = part["notation"] == "json"
            written.append(json_rule(value) if is_schema else source[part.start() : position])
        else:
            written.append(_rewrite(part, ends_as_in_python))
    return "".join([*written, source[position:]])


def _rewrite(part: re.Match[str], ends_as_in_python: bool) -> str:
    if part["regex"]:
        body = part["body"].replace(r"\/", "/")
        flags = "".join(sorted({*part["flags"]} - {"l", "u"}))
        node = parse_regex(f"(?{flags}:{body})" if flags else body)
        return as_lark(first_match(node, part["regex"][:80]) if ends_as_in_python else node)
    if part["text"] and ends_as_in_python:
        return _as_json(part["text"])
    return part["text"] or (part["import"] or "").replace("->", " -> ")


def _as_json(text: str) -> str:
    """A text of Lark, whose escapes are those of Python, with the escapes of JSON."""
    quoted, _, flags = text.rpartition('"')

    def unescaped(match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        if not code:
            return _ESCAPED.get(match[0][1:], match[0])
        if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) <= 0xDFFF:
            raise GrammarError(f"The grammar has the text {text[:80]}, in which {match[0]} is no character.")
        return chr(int(code, 16))

    return json.dumps(_ESCAPE.sub(unescaped, quoted[1:]), ensure_ascii=False) + flags
