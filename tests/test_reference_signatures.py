"""Names, defaults and positional orders against an excerpt of both vLLM versions' signatures."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from taco import inputs, logprobs, lora_request, outputs, sampling_params

API: dict[str, dict[str, dict[str, str | None]]] = json.loads(
    (Path(__file__).parent / "data" / "vllm_api_params.json").read_text()
)
OURS: dict[str, Any] = {
    name: getattr(module, name)
    for module in (inputs, logprobs, lora_request, outputs, sampling_params)
    for name in {name for classes in API.values() for name in classes}
    if hasattr(module, name)
}
TYPED_DICTS = ["TextPrompt", "TokensPrompt", "EmbedsPrompt", "DataPrompt", "ExplicitEncoderDecoderPrompt"]
# Where the two versions' defaults differ, taco takes 0.6's.
OTHER_DEFAULTS = {("SamplingParams", "top_k"): "-1"}
# 0.33 cannot be served without `orig_prompt`, which 0.6 does not have.
NOT_REQUIRED = {("BeamSearchSequence", "orig_prompt")}

CLASSES = [
    (version, name)
    for version, classes in API.items()
    for name in classes
    if name not in TYPED_DICTS and name != "RequestStateStats"
]


def defaults_of(cls: type) -> dict[str, object]:
    """Defaults of the constructor, and of fields that it does not take."""
    found: dict[str, object] = {}
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            if field.default_factory is not dataclasses.MISSING:
                found[field.name] = field.default_factory()
            elif field.default is not dataclasses.MISSING:
                found[field.name] = field.default
            else:
                found[field.name] = inspect.Parameter.empty
    else:
        found = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    return found


@pytest.mark.parametrize(("version", "name"), CLASSES)
def test_constructors_take_what_both_versions_take_with_the_same_defaults(version: str, name: str) -> None:
    ours = defaults_of(OURS[name])
    for parameter, text in API[version][name].items():
        assert parameter in ours
        if (name, parameter) in NOT_REQUIRED:
            continue
        text = OTHER_DEFAULTS.get((name, parameter), text)
        expected = inspect.Parameter.empty if text is None else eval(text, vars(sampling_params).copy())
        assert ours[parameter] == expected and type(ours[parameter]) is type(expected), parameter


@pytest.mark.parametrize("name", [name for version, name in CLASSES if version.startswith("0.6")])
def test_positional_order_is_that_of_0_6(name: str) -> None:
    theirs = list(API["0.6.6.post1"][name])
    ours = list(inspect.signature(OURS[name]).parameters)
    if name == "RequestOutput":
        theirs.remove("multi_modal_placeholders")  # keyword-only in both
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("name", TYPED_DICTS)
def test_prompt_dicts_have_the_keys_of_both_versions(name: str) -> None:
    for classes in API.values():
        for key in classes.get(name, {}):
            assert key in OURS[name].__annotations__
            assert key in inputs._KNOWN_KEYS


def test_metrics_answer_to_both_naming_schemes() -> None:
    metrics = outputs.RequestMetrics(10.0, 14.0, 11.0, 12.0, 1.0)
    for name in (*API["0.6.6.post1"]["RequestMetrics"], *API["0.33.0"]["RequestStateStats"]):
        assert hasattr(metrics, name)
