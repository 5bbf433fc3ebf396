from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.inputs import ParsedPrompt, TacoPromptTypeError, TextPrompt, TokensPrompt, parse_prompt, split_prompts


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_kept_to_the_letter(text: str) -> None:
    plain = ParsedPrompt(text, None, None, text)
    assert parse_prompt(text) == plain
    assert parse_prompt(TextPrompt(prompt=text)) == plain
    assert parse_prompt({"prompt": text, "prompt_token_ids": None, "multi_modal_data": None}) == plain


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_token_ids_in_every_form_become_one_list_of_ints(ids: list[int]) -> None:
    forms: list[Any] = [ids, tuple(ids), np.array(ids, np.int64), [np.int64(i) for i in ids]]
    for form in forms:
        for prompt in (form, {"prompt_token_ids": form}, TokensPrompt(prompt_token_ids=form)):
            parsed = parse_prompt(prompt)
            assert parsed == ParsedPrompt(None, ids)
            assert parsed.token_ids is not None and all(type(i) is int for i in parsed.token_ids)
            assert parsed.token_ids is not ids


def test_token_ids_win_over_text_which_is_echoed() -> None:
    parsed = parse_prompt({"prompt": "Hi", "prompt_token_ids": [1, 2], "cache_salt": "me"})
    assert parsed == ParsedPrompt(None, [1, 2], "me", "Hi")


def test_any_mapping_is_a_prompt_dictionary() -> None:
    assert parse_prompt(MappingProxyType({"prompt": "Hi"})).text == "Hi"


def test_empty_prompts_have_the_right_form() -> None:
    assert parse_prompt("").text == ""
    assert parse_prompt([]).token_ids == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "Prompt should be a string, list of tokens, or dictionary"),
        (5, "inputs must be a string, TextPrompt, or TokensPrompt"),
        (2.5, "type float"),
        (True, "type bool"),
        ({}, "Prompt dictionary must contain text, tokens, or embeddings"),
        ({"prompt": None}, "Prompt dictionary must contain text, tokens, or embeddings"),
        ({"cache_salt": "a"}, "Prompt dictionary must contain text, tokens, or embeddings"),
        ({"prompt": 5}, "Prompt text should be a string"),
        ({"prompt": [1, 2]}, "Prompt text should be a string"),
        ({"prompt": 5, "prompt_token_ids": [1]}, "Prompt text should be a string"),
        (
            {"prompt": "a", "promt_token_ids": [1], 3: 1},
            r"unknown key\(s\) 'promt_token_ids', 3; known are \['prompt',",
        ),
        (["a", "b"], "Token prompt should be a list of integers, got 'a' of type str at position 0"),
        ([1, 2.0], "got 2.0 of type float at position 1"),
        ([1, True], "got True of type bool at position 1"),
        ([1, None], "type NoneType at position 1"),
        ([[1, 2]], "type list at position 0"),
        ({"prompt_token_ids": "abc"}, "Token prompt should be a list of integers, got str"),
        ({"prompt_token_ids": 3}, "Token prompt should be a list of integers, got int"),
        (np.array([[1, 2]]), r"array of shape \(1, 2\)"),
        (np.array([1.0]), "type float64"),
        (np.array([True]), "type bool"),
    ],
)
def test_malformed_prompts_are_type_errors_and_value_errors(prompt: object, message: str) -> None:
    with pytest.raises(TacoPromptTypeError, match=message) as caught:
        parse_prompt(prompt)
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, TacoValidationError)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ({"prompt_embeds": np.zeros((2, 4))}, "prompt_embeds"),
        (b"serialized", "prompt_embeds"),
        ({"prompt": "a", "multi_modal_data": {"image": object()}}, "multi_modal_data"),
        ({"prompt": "a", "mm_processor_kwargs": {"num_crops": 4}}, "mm_processor_kwargs"),
        ({"encoder_prompt": "a", "decoder_prompt": None}, "encoder_prompt"),
        ({"data": 1, "data_format": "x"}, "data"),
        ({"prompt_token_ids": [1], "token_type_ids": [0]}, "token_type_ids"),
        ({"prompt_token_ids": [1], "prompt_token_offsets": [(0, 1)]}, "prompt_token_offsets"),
    ],
)
def test_what_does_not_exist_yet_is_refused_by_name(prompt: object, name: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=name):
        parse_prompt(prompt)


def test_unused_options_are_no_obstacle() -> None:
    prompt = {"prompt": "a", "multi_modal_data": {}, "mm_processor_kwargs": {}, "multi_modal_uuids": None}
    assert parse_prompt(prompt).text == "a"


@pytest.mark.parametrize(
    ("salt", "message"), [("", "a non-empty string"), (5, "a non-empty string"), ("a\ud800", "valid Unicode")]
)
def test_a_cache_salt_is_a_non_empty_string(salt: object, message: str) -> None:
    with pytest.raises(TacoValidationError, match=f"cache_salt must be {message}"):
        parse_prompt({"prompt": "a", "cache_salt": salt})


@given(st.text(), st.text(st.characters(categories=["Cs"]), min_size=1), st.text())
def test_lone_surrogates_are_found_and_the_advised_repair_works(before: str, surrogates: str, after: str) -> None:
    text = before.encode("utf-8", "replace").decode() + surrogates + after
    position = len(text) - len(surrogates) - len(after)
    advice = "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
    for prompt in (text, {"prompt": text}, {"prompt": text, "prompt_token_ids": [1]}):
        with pytest.raises(TacoValidationError, match=f"at character {position},") as caught:
            parse_prompt(prompt)
        assert f"U+{ord(surrogates[0]):04X}" in str(caught.value) and advice in str(caught.value)
    parse_prompt(eval(advice, {"text": text}))


def test_the_advised_repair_joins_surrogate_pairs() -> None:
    assert "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16", "replace") == "\U0001f600"


@pytest.mark.parametrize("one", ["text", "", {"prompt": "a"}, b"x", [1, 2], [np.int64(1)], {}])
def test_one_prompt_is_not_split(one: Any) -> None:
    assert split_prompts(one) == [one]


def test_arrays_of_integers_are_one_prompt_or_one_a_row() -> None:
    ids = np.array([[1, 2], [3, 4]])
    assert [list(prompt) for prompt in split_prompts(ids[0])] == [[1, 2]]  # type: ignore[call-overload]
    assert [list(prompt) for prompt in split_prompts(ids)] == [[1, 2], [3, 4]]  # type: ignore[call-overload]
    assert split_prompts(np.array(["a", "b"])) == ["a", "b"]


@pytest.mark.parametrize(
    "many",
    [["a"], ["a", [1], {"prompt": "b"}], [[1, 2], [3]], [{"prompt": "a"}], [[]], [None, 5], [True], []],
)
def test_many_prompts_come_out_one_by_one(many: list[Any]) -> None:
    assert split_prompts(many) == many
    assert split_prompts(many) is not many
    assert split_prompts(tuple(many)) == many
    assert split_prompts(item for item in many) == many


@pytest.mark.parametrize("wrong", [None, 5, {"a", "b"}, np.array(3)])
def test_other_things_are_not_prompts(wrong: object) -> None:
    with pytest.raises(TacoPromptTypeError, match="prompts"):
        split_prompts(wrong)
