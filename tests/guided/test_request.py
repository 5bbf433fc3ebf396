"""What callers ask for, in either version's form, as `GrammarSpec`."""

from __future__ import annotations

import json
import warnings
from enum import Enum
from typing import Any, Literal

import pydantic
import pytest

from taco.config import GuidedDecodingConfig
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.guided.protocol import GrammarError
from taco.guided.request import (
    BACKENDS,
    GuidedDecodingRequest,
    LLMGuidedOptions,
    StructuredOutputsConfig,
    read_guided_options,
    to_spec,
    with_constraint,
)
from taco.guided.schema import read_schema
from taco.guided.spec import GrammarKind, GrammarSpec
from taco.sampling_params import GuidedDecodingParams, SamplingParams, StructuredOutputsParams

CONFIG = GuidedDecodingConfig()
BOTH = [GuidedDecodingParams, StructuredOutputsParams]


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Car(pydantic.BaseModel):
    name: str
    color: Color
    doors: int = pydantic.Field(ge=2, le=5)


def schema_of(constraint: Any, config: GuidedDecodingConfig = CONFIG) -> Any:
    spec = to_spec(constraint, config)
    assert spec is not None and spec.kind is GrammarKind.JSON
    return json.loads(spec.source)


# The kinds


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("json", {"b": 1, "a": ["ä"]}, (GrammarKind.JSON, '{"b":1,"a":["ä"]}')),
        ("json", ' {"b": 1,\n "a": 2} ', (GrammarKind.JSON, '{"b":1,"a":2}')),
        ("json", {}, (GrammarKind.JSON, "{}")),
        ("regex", r" \d+ ", (GrammarKind.REGEX, r" \d+ ")),
        ("choice", ["yes", "no", "yes", ""], (GrammarKind.CHOICE, '["yes","no",""]')),
        ("choice", (1, 2), (GrammarKind.CHOICE, '["1","2"]')),
        ("choice", Color, (GrammarKind.CHOICE, '["red","blue"]')),
        ("choice", [Color.BLUE], (GrammarKind.CHOICE, '["blue"]')),
        ("choice", Literal["x", "y"], (GrammarKind.CHOICE, '["x","y"]')),
        ("grammar", '\nroot ::= "a"\n', (GrammarKind.GRAMMAR, 'root ::= "a"')),
        ("json_object", True, (GrammarKind.JSON, '{"type":"object"}')),
    ],
)
def test_kinds(form: Any, kind: str, value: Any, expected: tuple[GrammarKind, str]) -> None:
    assert to_spec(form(**{kind: value}), CONFIG) == GrammarSpec(*expected)


@pytest.mark.parametrize(
    "value", ['{"type": "structural_tag", "format": {}}', {"type": "structural_tag", "format": {}}]
)
def test_structural_tags_are_text_or_a_dict(value: Any) -> None:
    spec = to_spec(StructuredOutputsParams(structural_tag=value), CONFIG)
    assert spec == GrammarSpec(GrammarKind.STRUCTURAL_TAG, '{"type":"structural_tag","format":{}}')


@pytest.mark.parametrize("value", [Car, Car(name="a", color=Color.RED, doors=2), pydantic.TypeAdapter(Car)])
def test_a_pydantic_model_stands_for_its_schema(value: Any) -> None:
    schema = schema_of(GuidedDecodingParams(json=value))
    assert schema == {**Car.model_json_schema(), "additionalProperties": False}
    assert list(schema["properties"]) == ["name", "color", "doors"]


@pytest.mark.parametrize("value", [list[Car], int | None, dict[str, int], Literal["a", 1], Color])
def test_other_types_that_pydantic_knows_stand_for_theirs(value: Any) -> None:
    schema = schema_of(StructuredOutputsParams(json=value))
    assert "additionalProperties" in str(schema) or schema == pydantic.TypeAdapter(value).json_schema()


def test_objects_have_no_other_properties_unless_the_schema_says_so() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object"}}}
    assert schema_of(GuidedDecodingParams(json=schema)) == {**schema, "additionalProperties": False}
    assert "additionalProperties" not in schema
    is_open = {**schema, "additionalProperties": True}
    assert schema_of(GuidedDecodingParams(json=is_open)) == is_open


class Bus(pydantic.BaseModel):
    kind: Literal["bus"]
    seats: int


class Tram(pydantic.BaseModel):
    kind: Literal["tram"]
    line: str


class Ride(pydantic.BaseModel):
    on: Bus | Tram = pydantic.Field(discriminator="kind")
    minutes: int


def test_objects_that_are_options_of_one_of_have_no_other_properties_either() -> None:
    spec = to_spec(GuidedDecodingParams(json=Ride), CONFIG)
    assert spec is not None and '"oneOf"' in spec.source
    root = read_schema(spec.source, spec.additional_properties).root
    assert len(root["$defs"]) == 2
    assert all(one["additionalProperties"] is False for one in (root, *root["$defs"].values()))


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "integer"}, {"properties": {"a": {}}, "required": ["b"]}]},
        {"oneOf": [{"type": "integer"}, {"type": "string"}], "required": ["b"]},
        {"properties": {"a": {"oneOf": [{"type": "integer"}]}, "b": {"allOf": [{"type": "object"}]}}},
    ],
)
def test_where_options_may_need_others_they_may_come(schema: dict[str, Any]) -> None:
    spec = to_spec(GuidedDecodingParams(json=schema), CONFIG)
    assert spec is not None and spec.additional_properties and json.loads(spec.source) == schema


def test_so_it_is_in_structural_tags() -> None:
    schema = {"properties": {"a": {}}}
    closed = {**schema, "additionalProperties": False}
    older = {"structures": [{"begin": "<", "schema": schema, "end": ">"}], "triggers": ["<"]}
    newer = {"format": {"type": "sequence", "elements": [{"type": "json_schema", "json_schema": schema}]}}
    for tag in (older, newer):
        spec = to_spec(StructuredOutputsParams(structural_tag=json.dumps(tag)), CONFIG)
        assert spec is not None and json.loads(spec.source) == json.loads(
            json.dumps(tag).replace(json.dumps(schema), json.dumps(closed))
        )


def test_equal_constraints_are_equal_and_serve_as_keys() -> None:
    specs = [to_spec(form(json=text), CONFIG) for form in BOTH for text in ('{"a":1}', {"a": 1}, '{ "a" : 1 }')]
    assert len(set(specs)) == 1
    assert to_spec(GuidedDecodingParams(json={"a": 1, "b": 2}), CONFIG) != to_spec(
        GuidedDecodingParams(json={"b": 2, "a": 1}), CONFIG
    )
    # What matters to JSON alone does not tell others apart.
    assert to_spec(GuidedDecodingParams(regex="a", whitespace_pattern=" "), CONFIG) == GrammarSpec(
        GrammarKind.REGEX, "a"
    )


@pytest.mark.parametrize(
    "constraint",
    [None, GuidedDecodingParams(), GuidedDecodingParams(backend="outlines"), GuidedDecodingParams(json_object=False)],
)
def test_no_constraint_is_none(constraint: Any) -> None:
    assert to_spec(constraint, CONFIG) is None


# Options


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"lm-format-enforcer"}))
def test_backends_have_the_names_of_vllm_and_their_own(name: str) -> None:
    spec = to_spec(GuidedDecodingParams(regex="a", backend=name), GuidedDecodingConfig(backend="xgrammar"))
    assert spec is not None and spec.backend == BACKENDS[name]


def test_a_backend_that_taco_lacks_is_auto_with_a_warning_and_others_are_errors() -> None:
    with pytest.warns(UserWarning, match="lm-format-enforcer"):
        spec = to_spec(GuidedDecodingParams(regex="a", backend="lm-format-enforcer"), CONFIG)
    assert spec is not None and spec.backend == "auto"
    with pytest.raises(UnsupportedFeatureError, match=r"guided_decoding.backend must be one of \['auto'"):
        to_spec(GuidedDecodingParams(regex="a", backend="fast"), CONFIG)


def test_options_of_json() -> None:
    def options(constraint: Any, config: GuidedDecodingConfig = CONFIG) -> tuple[Any, ...]:
        spec = to_spec(constraint, config)
        assert spec is not None
        return spec.whitespace_pattern, spec.any_whitespace, spec.additional_properties

    strict = GuidedDecodingConfig(disable_any_whitespace=True, disable_additional_properties=True)
    assert options(GuidedDecodingParams(json={})) == (None, True, True)
    assert options(GuidedDecodingParams(json={}, whitespace_pattern=" ?")) == (" ?", True, True)
    assert options(GuidedDecodingParams(json={}), strict) == (None, False, False)
    assert options(GuidedDecodingParams(json={}, whitespace_pattern=""), strict) == ("", True, False)
    assert options(StructuredOutputsParams(json={}, disable_any_whitespace=True)) == (None, False, True)
    assert options(StructuredOutputsParams(json={}, disable_additional_properties=True)) == (None, True, False)
    # Any object would be none.
    assert options(StructuredOutputsParams(json_object=True), strict) == (None, False, True)
    with pytest.raises(TacoValidationError, match="contradict each other"):
        options(StructuredOutputsParams(json={}, disable_any_whitespace=True, whitespace_pattern=" "))
    with pytest.raises(GrammarError, match="whitespace_pattern must be a regular expression"):
        options(GuidedDecodingParams(json={}, whitespace_pattern=5))  # type: ignore[arg-type]


# Errors


def circular() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json", "", "json cannot be an empty string"),
        ("json", " ", "json cannot be an empty string"),
        ("json", '{"a":', "json is not valid JSON: "),
        ("json", '{"a": NaN}', "cannot be written as JSON"),
        ("json", "[" * 100_000, "json is not valid JSON: is nested too deeply"),
        ("json", '"string"', "json must be a JSON schema"),
        ("json", "[1]", "json must be a JSON schema"),
        ("json", ["a"], "json must be a JSON schema .* or a type that pydantic knows"),
        ("json", 5, "json must be a JSON schema .* or a type that pydantic knows"),
        ("json", {"a": object}, "cannot be written as JSON"),
        ("json", {"a": float("inf")}, "cannot be written as JSON"),
        ("json", {"title": "\ud800"}, "lone surrogate"),
        ("json", circular(), "nested more than 64 levels deep"),
        ("regex", "", "regex cannot be an empty string"),
        ("regex", "a\0", "must not contain a NUL character"),
        ("regex", 5, "regex must be a string"),
        ("regex", "\udfff", "lone surrogate"),
        ("choice", [], "cannot be an empty list"),
        ("choice", "yes", "choice must be a list of strings"),
        ("choice", 5, "choice must be a list of strings"),
        ("choice", {"a": 1}, "choice must be a list of strings"),
        ("choice", ["a", None], "choice must be a list of strings"),
        ("choice", [True], "choice must be a list of strings"),
        ("choice", ["\ud800"], "lone surrogate"),
        ("grammar", " ", "grammar cannot be an empty string"),
        ("grammar", [], "grammar must be a string"),
    ],
)
def test_broken_constraints_are_named(form: Any, kind: str, value: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        to_spec(form(**{kind: value}), CONFIG)
    field = "guided_decoding" if form is GuidedDecodingParams else "structured_outputs"
    assert caught.value.parameter == f"{field}.{kind}"
    assert f"{field}.{kind}" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"json_object": False}, "json_object must be True if set"),
        ({"json_object": 1}, "json_object must be True if set"),
        ({"structural_tag": ""}, "structural_tag cannot be an empty string"),
        ({"structural_tag": "[]"}, "structural_tag must be a JSON object"),
        ({"structural_tag": Car}, "structural_tag must be a JSON object"),
    ],
)
def test_errors_of_structured_outputs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        to_spec(StructuredOutputsParams(**values), CONFIG)


def test_schemas_may_be_nested_to_a_limit() -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {}
        for _ in range(depth - 1):
            schema = {"items": schema}
        return schema

    assert to_spec(GuidedDecodingParams(json=nested(64)), CONFIG) is not None
    with pytest.raises(GrammarError, match="nested more than 64 levels deep"):
        to_spec(GuidedDecodingParams(json=nested(65)), CONFIG)


def test_attributes_that_were_assigned_count() -> None:
    constraint = StructuredOutputsParams(regex="a")
    constraint.choice = ["b"]
    with pytest.raises(TacoValidationError, match="only use one kind of structured outputs constraint but multiple"):
        to_spec(constraint, CONFIG)
    constraint.regex = None
    assert to_spec(constraint, CONFIG) == GrammarSpec(GrammarKind.CHOICE, '["b"]')


# guided_options_request


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, GuidedDecodingParams()),
        ({"guided_regex": "a"}, GuidedDecodingParams(regex="a")),
        ({"guided_json": Car}, GuidedDecodingParams(json=Car)),
        (LLMGuidedOptions(guided_choice=["a"]), GuidedDecodingParams(choice=["a"])),
        ({"guided_json_object": True}, GuidedDecodingParams(json_object=True)),
        (
            GuidedDecodingRequest(
                guided_grammar="g", guided_decoding_backend="outlines", guided_whitespace_pattern=" "
            ),
            GuidedDecodingParams(grammar="g", backend="outlines", whitespace_pattern=" "),
        ),
    ],
)
def test_guided_options_stand_for_guided_decoding(options: Any, expected: GuidedDecodingParams) -> None:
    assert read_guided_options(options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"guided_regex": "a", "guided_choice": ["a"]},
            "You can only use one guided decoding but multiple is specified",
        ),
        ({"guided_regex": "a", "guided_decoding_backend": "outlines"}, "multiple is specified"),
        ({"guided_regexp": "a"}, "dict with one of"),
        ("a", "must be a GuidedDecodingRequest"),
        (GuidedDecodingParams(regex="a"), "must be a GuidedDecodingRequest"),
    ],
)
def test_wrong_guided_options_are_errors(options: Any, message: str) -> None:
    with pytest.raises(TacoValidationError, match=message):
        read_guided_options(options)


def test_a_guided_request_has_one_constraint() -> None:
    with pytest.raises(ValueError, match="You can only use one kind of guided decoding"):
        GuidedDecodingRequest(guided_regex="a", guided_json_object=True)
    GuidedDecodingRequest(guided_regex="a", guided_decoding_backend="outlines", guided_whitespace_pattern=" ")


def test_a_constraint_is_added_to_copies_of_which_there_are_as_few_as_of_the_params() -> None:
    one, other = SamplingParams(n=2), SamplingParams(temperature=0.5)
    constraint = GuidedDecodingParams(regex="a")
    completed = with_constraint([one, other, one, 5], "argument", guided_decoding=constraint)
    assert completed[0] is completed[2] is not one and completed[3] == 5
    assert [params.guided_decoding for params in completed[:2]] == [constraint] * 2
    assert completed[0].n == 2 and completed[1].temperature == 0.5
    assert one.guided_decoding is None and other.guided_decoding is None
    assert with_constraint(one, "argument", guided_decoding=constraint).guided_decoding is constraint
    for field, given in (("guided_decoding", constraint), ("structured_outputs", StructuredOutputsParams(regex="a"))):
        with pytest.raises(TacoValidationError, match=f"^Cannot set both argument and params.{field}"):
            with_constraint([one, SamplingParams(**{field: given})], "argument", guided_decoding=constraint)


# StructuredOutputsConfig


def test_a_config_has_a_digest_of_its_fields() -> None:
    assert StructuredOutputsConfig().compute_hash() == StructuredOutputsConfig("auto").compute_hash()
    assert StructuredOutputsConfig().compute_hash() != StructuredOutputsConfig("outlines").compute_hash()


def test_a_config_is_read_from_whatever_has_its_fields() -> None:
    class Theirs:
        backend = "guidance"
        disable_any_whitespace = True

    expected = StructuredOutputsConfig("guidance", disable_any_whitespace=True)
    for values in (Theirs(), {"backend": "guidance", "disable_any_whitespace": True}, expected):
        assert StructuredOutputsConfig.from_mapping(values) == expected


def test_nothing_warns_where_nothing_is_replaced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_spec(GuidedDecodingParams(json=Car, backend="guidance"), CONFIG)
