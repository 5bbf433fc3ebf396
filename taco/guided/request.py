"""From the forms in which callers ask for guided decoding, those of both vLLM versions, to `GrammarSpec`.

What is found out here needs no vocabulary and no library: wrong types, empty constraints, schemas that are no JSON.
Everything else is for the backends.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any, Literal, TypedDict, get_args, get_origin

from taco.config import GuidedDecodingConfig
from taco.constraint_params import GuidedDecodingParams, StructuredOutputsParams
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.guided.protocol import GrammarError
from taco.guided.spec import GrammarKind, GrammarSpec
from taco.json_schema import SCALARS, close_objects, has_plain_options
from taco.sampling_params import SamplingParams

MAX_DEPTH = 64  # dicts and lists within each other, in a schema
ANY_OBJECT = '{"type":"object"}'

# Names of the backends, and those that vLLM has for them.
BACKENDS = {
    "auto": "auto",
    "llguidance": "llguidance",
    "guidance": "llguidance",
    "outlines": "outlines",
    "xgrammar": "xgrammar",
    "lm-format-enforcer": "auto",
}


class LLMGuidedOptions(TypedDict, total=False):
    """`guided_options_request` as a dict, of which one key may be given; the fields of `GuidedDecodingRequest`."""

    guided_json: str | dict[str, Any] | type
    guided_regex: str
    guided_choice: list[str]
    guided_grammar: str
    guided_decoding_backend: str
    guided_whitespace_pattern: str
    guided_json_object: bool


@dataclass
class GuidedDecodingRequest:
    """Constraint on the generated text, for `guided_options_request`; deprecated in favour of `GuidedDecodingParams`.

    The fields are those of `GuidedDecodingParams`.
    """

    guided_json: str | dict[str, Any] | type | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_json_object: bool | None = None

    def __post_init__(self) -> None:
        self.as_params()

    def as_params(self) -> GuidedDecodingParams:
        """The same in today's form.

        Raises:
            TacoValidationError: more than one kind of constraint is given.
        """
        return GuidedDecodingParams(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
            json_object=self.guided_json_object,
            backend=self.guided_decoding_backend,
            whitespace_pattern=self.guided_whitespace_pattern,
        )


def read_guided_options(options: object) -> GuidedDecodingParams:
    """What `guided_options_request` asks for.

    Raises:
        TacoValidationError: it has more than one key, or is neither a dict nor a `GuidedDecodingRequest`.
    """
    if isinstance(options, GuidedDecodingRequest):
        return options.as_params()
    known = list(LLMGuidedOptions.__annotations__)
    if not isinstance(options, Mapping) or not set(options) <= set(known):
        raise TacoValidationError(
            f"guided_options_request must be a GuidedDecodingRequest, or a dict with one of {known}, got "
            f"{options!r:.200}.",
            parameter="guided_options_request",
            value=options,
        )
    if len(options) > 1:
        raise TacoValidationError(
            f"You can only use one guided decoding but multiple is specified: {dict(options)!r:.200}. To choose the "
            "backend or the white space too, use guided_decoding=GuidedDecodingParams(...) of SamplingParams.",
            parameter="guided_options_request",
            value=options,
        )
    return GuidedDecodingRequest(**options).as_params()


@dataclass
class StructuredOutputsConfig:
    """`structured_outputs_config` of `LLM`: what holds where a request does not say otherwise.

    Args:
        backend: name of the grammar library, as in `GuidedDecodingParams`.
        disable_any_whitespace: JSON has no white space between its parts but what is customary after commas and colons,
            or none. A request with a `whitespace_pattern` has that instead.
        disable_additional_properties: see `StructuredOutputsParams`.
        reasoning_parser: as the argument of that name of `LLM`: the constraint is for what follows the reasoning.
        reasoning_parser_plugin: must be empty.
        enable_in_reasoning: the text is constrained from its first token on, although the model reasons first.
    """

    backend: str = "auto"
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    reasoning_parser: str = ""
    reasoning_parser_plugin: str = ""
    enable_in_reasoning: bool = False

    def compute_hash(self) -> str:
        """A digest of all fields: equal for equal configs, in every process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @staticmethod
    def from_mapping(values: Any) -> StructuredOutputsConfig:
        """A config from a dict of its fields, or from an object that has them as attributes.

        Raises:
            TacoValidationError: a field is not known, or its value is wrong.
        """
        known = [field.name for field in fields(StructuredOutputsConfig)]
        if not isinstance(values, Mapping):
            values = {name: getattr(values, name) for name in known if hasattr(values, name)}
        if not values or not set(values) <= set(known):
            raise TacoValidationError(f"must be a StructuredOutputsConfig or a dict of its fields {known}")
        config = StructuredOutputsConfig(**values)
        backend_name(config.backend, "backend")
        for name in ("disable_any_whitespace", "disable_additional_properties", "enable_in_reasoning"):
            if not isinstance(getattr(config, name), bool):
                raise TacoValidationError(f"{name} must be True or False")
        if not isinstance(config.reasoning_parser, str):
            raise TacoValidationError("reasoning_parser must be a string")
        if config.reasoning_parser_plugin:
            raise UnsupportedFeatureError("reasoning_parser_plugin must be empty; name the marks with reasoning_config")
        return config


def with_constraint(params: Any, argument: str, **constraint: Any) -> Any:
    """Copies of sampling parameters with a constraint; the caller's are not changed, and what is none stays as it is.

    Args:
        params: a `SamplingParams`, or a list of them; what is one object there is one object in the result.
        argument: of the caller, that has the constraint.
        constraint: the field to set.

    Raises:
        TacoValidationError: one of `params` has a constraint already.
    """
    copies: dict[int, Any] = {}

    def completed(one: Any) -> Any:
        if not isinstance(one, SamplingParams):
            return one
        for field in ("guided_decoding", "structured_outputs"):
            if getattr(one, field) is not None:
                raise TacoValidationError(f"Cannot set both {argument} and params.{field}.", parameter=argument)
        if id(one) not in copies:
            copies[id(one)] = copy.copy(one)
            vars(copies[id(one)]).update(constraint)
        return copies[id(one)]

    return list(map(completed, params)) if isinstance(params, Sequence) else completed(params)


def backend_name(name: object, parameter: str) -> str:
    """The name of a backend by one of its names; "auto" for a backend of vLLM that taco does not have, with a warning.

    Raises:
        UnsupportedFeatureError: there is no such backend.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise UnsupportedFeatureError(
            f"{parameter} must be one of {list(BACKENDS)}, got {name!r}.", parameter=parameter, value=name
        )
    if name == "lm-format-enforcer":
        warnings.warn(
            f'{parameter}={name!r}: taco does not have this library and uses backend="auto", which enforces the same.',
            stacklevel=2,
        )
    return BACKENDS[name]


def to_spec(
    params: GuidedDecodingParams | StructuredOutputsParams | None, config: GuidedDecodingConfig
) -> GrammarSpec | None:
    """What the text has to match; None if that is anything.

    Args:
        params: the constraint in either form.
        config: what holds where `params` do not say otherwise; its backend is for those who read the result.

    Raises:
        TacoValidationError: there are several constraints, or one that is of a wrong type, empty or no JSON.
    """
    if params is None:
        return None
    field = "guided_decoding" if isinstance(params, GuidedDecodingParams) else "structured_outputs"
    params.__post_init__()  # attributes may have been assigned since
    kind = params.constraint_kind
    if kind is None or (kind == "json_object" and field == "guided_decoding" and not params.json_object):
        return None
    name = f"{field}.{kind}"
    value = getattr(params, kind)
    backend = params.backend if isinstance(params, GuidedDecodingParams) else params._backend
    backend = backend_name(backend or "auto", f"{field}.backend")
    if kind == "choice":
        return GrammarSpec(GrammarKind.CHOICE, _dumps(name, _choices(name, value)), backend=backend)
    if kind == "regex":
        if "\0" in (source := _text(name, value)):
            raise GrammarError(f"{name} must not contain a NUL character ('\\x00').", parameter=name, value=value)
        return GrammarSpec(GrammarKind.REGEX, source, backend=backend)
    if kind == "grammar":
        return GrammarSpec(
            GrammarKind.GRAMMAR, _text(name, value.strip() if isinstance(value, str) else value), backend=backend
        )

    pattern = params.whitespace_pattern
    if pattern is not None and not isinstance(pattern, str):
        raise _wrong(f"{field}.whitespace_pattern", "a regular expression as text", pattern)
    any_whitespace, additional_properties = pattern is not None or not config.disable_any_whitespace, True
    if isinstance(params, StructuredOutputsParams):
        if params.disable_any_whitespace and pattern is not None:
            raise TacoValidationError(
                f"{field}.disable_any_whitespace and {field}.whitespace_pattern contradict each other; give one.",
                parameter=f"{field}.whitespace_pattern",
                value=pattern,
            )
        any_whitespace &= not params.disable_any_whitespace
        additional_properties = not params.disable_additional_properties
    additional_properties &= not config.disable_additional_properties
    if kind == "json_object":
        if value is not True:
            raise GrammarError(
                f"{name} must be True if set; omit {field} to disable structured outputs.", parameter=name, value=value
            )
        source, additional_properties = ANY_OBJECT, True
    else:
        found = _object(name, value, or_type=kind == "json")
        _check_depth(name, found)
        source = _dumps(name, close_objects(found) if kind == "json" else _close_schemas_of_tags(found))
        if kind == "json" and '"oneOf"' in source and has_plain_options(found):
            additional_properties = False
    return GrammarSpec(
        GrammarKind.STRUCTURAL_TAG if kind == "structural_tag" else GrammarKind.JSON,
        source,
        whitespace_pattern=pattern,
        any_whitespace=any_whitespace,
        additional_properties=additional_properties,
        backend=backend,
    )


def _wrong(name: str, expected: str, value: object, reason: str = "") -> GrammarError:
    because = f" ({reason})" if reason else ""
    return GrammarError(f"{name} must be {expected}, got {value!r:.200}{because}.", parameter=name, value=value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    if not value:
        raise GrammarError(f"{name} cannot be an empty string.", parameter=name, value=value)
    return _encodable(name, value)


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GrammarError(f"{name} has a lone surrogate, which is no text ({error}).", parameter=name) from None
    return text


def _choices(name: str, value: Any) -> list[str]:
    if get_origin(value) is Literal:
        value = get_args(value)
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _wrong(name, "a list of strings", value)
    choices = []
    for choice in value:
        choice = choice.value if isinstance(choice, Enum) else choice
        if isinstance(choice, bool) or not isinstance(choice, (str, int)):
            raise _wrong(name, "a list of strings (one element)", choice)
        choices.append(str(choice))
    if not choices:
        raise GrammarError(f"Choice '{value}': {name} cannot be an empty list.", parameter=name, value=value)
    return list(dict.fromkeys(choices))


def _object(name: str, value: Any, or_type: bool) -> Mapping[str, Any]:
    """The JSON object that a dict, a JSON text or (the schema of) a type stands for."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, str):
        if not value.strip():
            raise GrammarError(f"{name} cannot be an empty string.", parameter=name, value=value)
        try:
            found = json.loads(value)
        except (ValueError, RecursionError) as error:
            reason = "is nested too deeply" if isinstance(error, RecursionError) else error
            raise GrammarError(f"{name} is not valid JSON: {reason}.", parameter=name, value=value) from None
    else:
        found = _schema_of_type(name, value) if or_type else value
    if not isinstance(found, Mapping):
        what = (
            "a JSON schema (text or dict), or a type that pydantic knows" if or_type else "a JSON object (text or dict)"
        )
        raise _wrong(name, what, value)
    return found


def _close_schemas_of_tags(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_close_schemas_of_tags(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: close_objects(one) if key in ("schema", "json_schema") else _close_schemas_of_tags(one)
        for key, one in value.items()
    }


def _schema_of_type(name: str, value: Any) -> Mapping[str, Any] | None:
    """The schema that pydantic has for the JSON of a type; None where it has none."""
    from pydantic import BaseModel, TypeAdapter

    if isinstance(value, BaseModel):
        value = type(value)
    try:
        if isinstance(value, type) and issubclass(value, BaseModel):
            return value.model_json_schema()
        adapter = value if isinstance(value, TypeAdapter) else TypeAdapter(value)
        return adapter.json_schema()
    except Exception as error:  # pydantic raises many kinds
        reason = str(error).partition("\n")[0]
        raise _wrong(name, "a JSON schema (text or dict), or a type that pydantic knows", value, reason) from None


def _dumps(name: str, value: object) -> str:
    """JSON text with the keys in their order, and without white space, so that equal schemas are equal texts."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise GrammarError(f"{name} cannot be written as JSON: {error}.", parameter=name, value=value) from None
    return _encodable(name, text)


def _check_depth(name: str, value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [one for one in level if not isinstance(one, SCALARS) and isinstance(one, (list, tuple, Mapping))]
        if not containers:
            return
        level = [element for one in containers for element in (one if isinstance(one, (list, tuple)) else one.values())]
    raise GrammarError(
        f"{name} is nested more than {MAX_DEPTH} levels deep; use $defs and $ref for what repeats.",
        parameter=name,
    )
