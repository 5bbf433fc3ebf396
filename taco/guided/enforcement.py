"""Which library enforces which keyword of a JSON schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from taco.guided.protocol import GrammarError

# Keywords of some draft that no backend enforces; `propertyNames` may be spelt out beforehand.
NEVER_ENFORCED = frozenset(
    """not if then else dependentRequired dependentSchemas dependencies propertyNames contains minContains maxContains
    unevaluatedProperties unevaluatedItems uniqueItems $dynamicRef $recursiveRef divisibleBy extends disallow
    nullable""".split()
)
# What else a use of a keyword can need; each is a name in `ENFORCED`.
ENUM_AND_OTHERS = "enum or const next to other keywords"
MIXED = "anyOf, oneOf, allOf or $ref next to other keywords"
UNTYPED = "no type next to keywords for one type"
SEVERAL_TYPES = "a list of types"
AWKWARD_NAMES = "names of properties with quotes, backslashes or line ends"
UNNAMED_REQUIRED = "names in required that are not in properties"
OTHERS_BESIDE_NAMED = "a schema as additionalProperties next to properties"
FRACTION_BOUNDS = "bounds of numbers that need not be whole"
NOTHING = "false as a schema of a part"
RECURSION = "$ref to a schema that it is part of"

_ALL = frozenset(("llguidance", "xgrammar", "outlines"))
_GRAMMARS = frozenset(("llguidance", "xgrammar"))
_LLGUIDANCE = frozenset(("llguidance",))
# Which backend enforces which keyword. Where that depends on the value, `read_schema` leaves the others out.
ENFORCED: dict[str, frozenset[str]] = {
    "type": _ALL,
    SEVERAL_TYPES: _ALL,
    UNTYPED: _LLGUIDANCE,
    "enum": _ALL,
    ENUM_AND_OTHERS: _LLGUIDANCE,
    # Of numbers.
    "minimum": _GRAMMARS,
    "maximum": _GRAMMARS,
    FRACTION_BOUNDS: _LLGUIDANCE,  # xgrammar rounds small ones to 0
    "multipleOf": _LLGUIDANCE,
    # Of strings. To xgrammar these are texts in quotes: it lets quotes and control characters into them.
    "minLength": frozenset(("llguidance", "outlines")),
    "maxLength": frozenset(("llguidance", "outlines")),
    "pattern": _LLGUIDANCE,
    # Of arrays.
    "items": _ALL,
    "prefixItems": _GRAMMARS,
    "minItems": _ALL,
    "maxItems": _ALL,
    # Of objects. In xgrammar a property can come again as another one, its name written with \u.
    "properties": _ALL,
    AWKWARD_NAMES: _GRAMMARS,
    "required": _ALL,
    UNNAMED_REQUIRED: _LLGUIDANCE,
    "additionalProperties": _ALL,
    OTHERS_BESIDE_NAMED: _LLGUIDANCE,
    "patternProperties": _LLGUIDANCE,
    "minProperties": _GRAMMARS,
    "maxProperties": _GRAMMARS,
    NOTHING: _LLGUIDANCE,
    # Of schemas for the same value.
    "$ref": _ALL,
    RECURSION: _GRAMMARS,  # outlines follows it for three levels, and leaves out what is required there
    "anyOf": _ALL,
    "allOf": _LLGUIDANCE,
    MIXED: _LLGUIDANCE,
}


@dataclass
class NormalSchema:
    """A schema as the libraries get it.

    Attributes:
        root: the schema; what it refers to is in its `$defs`.
        uses: each entry of `ENFORCED` that it needs, with the first place where it does, as a JSON pointer.
    """

    root: dict[str, Any]
    uses: dict[str, str]

    def refuse_unless_enforced(self, backend: str) -> None:
        """
        Raises:
            GrammarError: the backend does not enforce all of it.
        """
        for name, path in self.uses.items():
            if backend not in ENFORCED[name]:
                raise GrammarError(
                    f"The JSON schema has {name!r} at {path}; the backend {backend!r} does not enforce that."
                )

    def explain(self, message: str) -> GrammarError:
        """An error for what a library says of the schema, with the keywords that it may be about."""
        wanted = next((keywords for words, keywords in _CAUSES.items() if words in message), ())
        found = [name for name in wanted if name in self.uses] or list(self.uses)[:8]
        places = ", ".join(f"{name!r} at {self.uses[name]}" for name in found)
        message = message.strip().partition("\n")[0][:300]
        return GrammarError(f"The JSON schema cannot be enforced ({message}). It is about {places}.")


# Words of llguidance, and the keywords that they are about.
_CAUSES = {
    "patternProperty": ("patternProperties",),
    "min/maxProperties": ("minProperties", "maxProperties"),
    "maxProperties": ("maxProperties", "minProperties", "required"),
    "circular": ("$ref",),
    "incompatible": ("allOf", "$ref", "anyOf", "enum"),
    "Regex is empty": ("pattern", "minLength", "maxLength", "enum"),
    "minItems": ("minItems", "maxItems", "prefixItems"),
    "maxLength": ("minLength", "maxLength"),
    "inimum": ("minimum", "maximum"),
    "integer interval": ("minimum", "maximum"),
    "multiple": ("multipleOf", "minimum", "maximum"),
    "required": ("required", "properties", "additionalProperties"),
}
