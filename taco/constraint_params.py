"""Constraints on the text of a request, in two forms: `GuidedDecodingParams` and `StructuredOutputsParams`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from taco.errors import TacoValidationError


def _require_one_constraint(what: str, constraints: dict[str, object], allow_none: bool) -> None:
    given = [name for name, value in constraints.items() if value is not None]
    if len(given) > 1:
        raise TacoValidationError(f"You can only use one kind of {what} but multiple are specified: {given}.")
    if not given and not allow_none:
        raise TacoValidationError(
            f"You must use one kind of {what} but none are specified; give one of {list(constraints)}."
        )


class _Constraint:
    """What the two forms of a constraint on the text have in common."""

    _kinds: ClassVar[tuple[str, ...]]

    @property
    def constraint_kind(self) -> str | None:
        """Name of the field that has the constraint; None if there is none."""
        return next((kind for kind in self._kinds if getattr(self, kind) is not None), None)


@dataclass
class GuidedDecodingParams(_Constraint):
    """Constraint on the generated text, in the form of vLLM 0.6; at most one kind may be given, none is no constraint.

    Args:
        json: JSON schema, as text or as a dict; or a type that pydantic knows, such as a model class. Properties come
            in the order of the schema, and there are no others where it does not say `additionalProperties`; unless
            several of its schemas concern one object, as with `allOf`.
        regex: regular expression that the whole text matches.
        choice: the text is one of these strings; or a `Literal` or an `Enum` class of strings.
        grammar: context-free grammar, in the notation of Lark, or GBNF/EBNF.
        json_object: True: any JSON object; False: no constraint.
        backend: name of the grammar library: "llguidance" (or "guidance"), "outlines", "xgrammar", or "auto" for the
            first that enforces all of it. One that cannot enforce a part of it leaves it to another. Default None = the
            engine's.
        whitespace_pattern: regular expression of the white space between the parts of JSON; matters to nothing else.
    """

    json: str | dict[str, Any] | type | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    backend: str | None = None
    whitespace_pattern: str | None = None

    _kinds = ("json", "regex", "choice", "grammar", "json_object")

    def __post_init__(self) -> None:
        _require_one_constraint("guided decoding", {kind: getattr(self, kind) for kind in self._kinds}, allow_none=True)

    @staticmethod
    def from_optional(
        json: dict[str, Any] | str | type | None = None,
        regex: str | None = None,
        choice: list[str] | None = None,
        grammar: str | None = None,
        json_object: bool | None = None,
        backend: str | None = None,
        whitespace_pattern: str | None = None,
    ) -> GuidedDecodingParams | None:
        """The parameters; None if there is no constraint among them."""
        if all(constraint is None for constraint in (json, regex, choice, grammar, json_object)):
            return None
        return GuidedDecodingParams(json, regex, choice, grammar, json_object, backend, whitespace_pattern)


@dataclass
class StructuredOutputsParams(_Constraint):
    """Constraint on the generated text, in the form of vLLM 0.33; exactly one kind must be given.

    Args:
        json, regex, choice, grammar, whitespace_pattern: see `GuidedDecodingParams`.
        json_object: True: any JSON object. False is an error.
        disable_any_whitespace: no white space between the parts of JSON but what is customary after commas and colons,
            or none.
        disable_additional_properties: JSON objects have no properties beyond those of the schema where it does not say
            otherwise, even if several of its schemas concern one object.
        structural_tag: JSON description, as text or as a dict, of tagged regions that are constrained.
    """

    json: str | dict[str, Any] | type | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    _backend: str | None = field(default=None, init=False)
    _backend_was_auto: bool = field(default=False, init=False)

    _kinds = (*GuidedDecodingParams._kinds, "structural_tag")

    def __post_init__(self) -> None:
        constraints = {kind: getattr(self, kind) for kind in self._kinds}
        _require_one_constraint("structured outputs constraint", constraints, allow_none=False)

    def all_constraints_none(self) -> bool:
        """Whether there is no constraint, as the one that was given has been set to None."""
        return self.constraint_kind is None

    def all_non_structural_tag_constraints_none(self) -> bool:
        """Whether there is no constraint but a `structural_tag`."""
        return self.constraint_kind in (None, "structural_tag")
