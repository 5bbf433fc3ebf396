from __future__ import annotations

import dataclasses

import pytest

from taco.compat import V0_6, V0_33, Behaviour, behaviour_for, set_default_version
from taco.errors import TacoValidationError
from taco.lora_request import LoRARequest, PromptAdapterRequest


@pytest.mark.parametrize(
    ("version", "preset"),
    [("0.6", V0_6), ("0.6.6.post1", V0_6), ("0.33", V0_33), ("0.33.0", V0_33)],
)
def test_a_version_has_the_preset_of_its_series(version: str, preset: Behaviour) -> None:
    assert behaviour_for(version) is preset


def test_the_default_is_0_6() -> None:
    assert behaviour_for() is V0_6


@pytest.mark.parametrize("version", ["0.3", "0.60", "1.0", ""])
def test_other_versions_are_refused_with_the_choices(version: str) -> None:
    with pytest.raises(TacoValidationError, match=r"\['0.6', '0.33'\]"):
        behaviour_for(version)


def test_every_choice_but_prefix_caching_tells_the_versions_apart() -> None:
    same = [
        field.name for field in dataclasses.fields(Behaviour) if getattr(V0_6, field.name) == getattr(V0_33, field.name)
    ]
    assert same == ["prefix_caching_default"]


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        V0_6.rank_counts_ties = True  # type: ignore[misc]


def test_lora_requests_are_equal_by_name() -> None:
    one, two = LoRARequest("sql", 1, "/a"), LoRARequest("sql", 2, "/b")
    assert one == two and hash(one) == hash(two)
    assert one != LoRARequest("chat", 1, "/a")
    assert one != "sql"
    assert (one.adapter_id, one.name, one.path, one.local_path) == (1, "sql", "/a", "/a")


def test_the_old_name_of_the_lora_path_works_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="lora_path"):
        assert LoRARequest("sql", 1, lora_local_path="/a").path == "/a"


@pytest.mark.parametrize(
    ("name", "number", "path", "parameter"),
    [("", 1, "/a", "lora_name"), ("sql", 0, "/a", "lora_int_id"), ("sql", True, "/a", "lora_int_id")]
    + [("sql", 1, "", "lora_path"), ("sql", "1", "/a", "lora_int_id")],
)
def test_lora_requests_refuse_wrong_values_by_name(name: str, number: int, path: str, parameter: str) -> None:
    with pytest.raises(TacoValidationError, match=parameter):
        LoRARequest(name, number, path)


def test_a_lora_request_without_a_path_fails_an_assertion_too() -> None:
    with pytest.raises(AssertionError, match="lora_path"):
        LoRARequest("sql", 1)


def test_the_default_of_the_process_can_be_set_and_reset() -> None:
    set_default_version("0.33.1")
    try:
        assert behaviour_for() is V0_33
        assert behaviour_for("0.6") is V0_6
        with pytest.raises(TacoValidationError, match="0.9"):
            set_default_version("0.9")
        assert behaviour_for() is V0_33
    finally:
        set_default_version()
    assert behaviour_for() is V0_6


def test_prompt_adapters_can_be_named() -> None:
    one, two = PromptAdapterRequest("a", 1, "/a", 8), PromptAdapterRequest("b", 1, "/b", 8)
    assert one == two and len({one, two}) == 1 and one != PromptAdapterRequest("a", 2, "/a", 8)
    assert (one.name, one.adapter_id, one.local_path) == ("a", 1, "/a")
