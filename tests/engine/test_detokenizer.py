from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.engine.detokenizer import ByteDetokenizer, ByteStream, WindowDetokenizer, make_detokenizer
from tests.tiny_tokenizers import SpacesOnlyTokenizer, byte_level_tokenizer, sentencepiece_tokenizer

OPTIONS: dict[str, bool] = {"skip_special_tokens": True, "spaces_between_special_tokens": True}
TOKENIZERS = {"byte level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}


def streamed(detokenizer: Any, prompt: Sequence[int], ids: Sequence[int], **options: bool) -> list[str]:
    stream = detokenizer.stream(prompt, **{**OPTIONS, **options})
    return [stream.append(token_id) for token_id in ids]


def some_ids(size: int) -> st.SearchStrategy[list[int]]:
    # Beyond the vocabulary too: models pad it.
    return st.lists(st.integers(0, size + 2), max_size=12)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_text_token_by_token_equals_text_at_once(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = some_ids(len(tokenizer))
    prompt, output = data.draw(ids), data.draw(ids)
    for detokenizer in (make_detokenizer(tokenizer), WindowDetokenizer(tokenizer)):
        pieces = streamed(detokenizer, prompt, output, skip_special_tokens=skip)
        assert "".join(pieces) == detokenizer.decode(prompt, output, **{**OPTIONS, "skip_special_tokens": skip})


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_preview_is_what_append_returns_and_changes_nothing(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = some_ids(len(tokenizer))
    prompt, output = data.draw(ids), data.draw(ids)
    for detokenizer in (make_detokenizer(tokenizer), WindowDetokenizer(tokenizer)):
        stream = detokenizer.stream(prompt, skip_special_tokens=skip, spaces_between_special_tokens=True)
        for token_id in output:
            stream.preview(data.draw(st.integers(0, len(tokenizer))), not skip)
            expected = stream.preview(token_id, skip)
            assert stream.append(token_id) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    prompt=st.text("ab héo😀\n", min_size=1, max_size=8), text=st.text("ab héo😀\n", max_size=12), skip=st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_text_equals_the_tokenizers_own_decoding_of_prompt_and_output(
    name: str, prompt: str, text: str, skip: bool
) -> None:
    tokenizer = TOKENIZERS[name]()
    detokenizer = make_detokenizer(tokenizer)
    assert isinstance(detokenizer, ByteDetokenizer)
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=skip)
    head = tokenizer.decode(prompt_ids, skip_special_tokens=skip)
    assert head + detokenizer.decode(prompt_ids, ids, **{**OPTIONS, "skip_special_tokens": skip}) == whole


@given(ids=some_ids(320))
@settings(max_examples=200, deadline=None)
def test_invalid_bytes_read_as_in_the_tokenizer_but_for_an_unfinished_end(ids: list[int]) -> None:
    tokenizer = byte_level_tokenizer()
    # U+00E9 in an added token is taken for a byte by the library, for a letter here.
    ids = [i for i in ids if tokenizer.convert_ids_to_tokens(min(i, len(tokenizer) - 1)) != "<é>"]
    text = make_detokenizer(tokenizer).decode([], ids, **OPTIONS)
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert expected.startswith(text) and expected[len(text) :] in ("", "\ufffd", "\ufffd\ufffd")


def test_a_character_is_held_back_until_it_is_complete() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode("😀a", add_special_tokens=False)
    assert streamed(make_detokenizer(tokenizer), [0], ids) == ["", "", "", "😀", "a"]
    llama = sentencepiece_tokenizer()
    ids = [3 + byte for byte in "€\n".encode()]
    assert streamed(make_detokenizer(llama), [1], ids) == ["", "", "€", "\n"]


def test_an_unfinished_character_is_left_out_at_the_end_and_replaced_in_the_middle() -> None:
    tokenizer = byte_level_tokenizer()
    half = tokenizer.encode("😀", add_special_tokens=False)[:2]
    letter = tokenizer.encode("a", add_special_tokens=False)
    assert make_detokenizer(tokenizer).decode([0], half, **OPTIONS) == ""
    assert make_detokenizer(tokenizer).decode([0], half + letter, **OPTIONS) == "\ufffda"


def test_a_character_begun_by_the_prompt_is_completed_by_the_output() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode("😀", add_special_tokens=False)
    letter = tokenizer.encode("a", add_special_tokens=False)
    detokenizer = make_detokenizer(tokenizer)
    assert streamed(detokenizer, ids[:2], ids[2:]) == ["", "😀"]
    # If it stays unfinished it is the prompt's, not the output's.
    assert detokenizer.decode(ids[:2], letter, **OPTIONS) == "a"


def test_the_space_of_a_first_word_is_kept_after_a_visible_prompt_only() -> None:
    tokenizer = sentencepiece_tokenizer()
    he = tokenizer.convert_tokens_to_ids("▁he")
    for detokenizer in (make_detokenizer(tokenizer), WindowDetokenizer(tokenizer)):
        assert streamed(detokenizer, tokenizer.encode("ab"), [he, he]) == [" he", " he"]
        assert streamed(detokenizer, [tokenizer.bos_token_id], [he, he]) == ["he", " he"]
        assert streamed(detokenizer, [], [he, he]) == ["he", " he"]
        assert detokenizer.stream([], **OPTIONS).preview(he, True) == "he"
    # Special tokens at the end of a prompt do not make the output the start of a text.
    many_special = tokenizer.encode("ab") + [2] * 40
    for detokenizer in (make_detokenizer(tokenizer), WindowDetokenizer(tokenizer)):
        assert streamed(detokenizer, many_special, [he]) == [" he"]


def test_a_token_by_itself_takes_a_character_up_only_if_it_goes_on_with_it() -> None:
    tokenizer = byte_level_tokenizer()
    smile = tokenizer.encode("😀", add_special_tokens=False)
    [letter] = tokenizer.encode("a", add_special_tokens=False)
    for detokenizer in (make_detokenizer(tokenizer), WindowDetokenizer(tokenizer)):
        for prompt, output in (([letter], smile[:-1]), ([letter, *smile[:-1]], [])):
            stream = detokenizer.stream(prompt, **OPTIONS)
            for token in output:
                assert stream.append(token) == ""
            if output:  # what a prompt leaves open is part of the prompt
                assert stream.preview(letter, True) == "\ufffda"
            assert stream.preview(letter, True, in_context=False) == "a"
            assert stream.preview(smile[0], True, in_context=False) == ""
            if isinstance(stream, ByteStream) or output:
                assert stream.preview(smile[-1], True, in_context=False) == "😀"


def test_special_tokens_are_hidden_or_shown() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode("a</s>b<tool call><é>", add_special_tokens=False)
    detokenizer = make_detokenizer(tokenizer)
    assert detokenizer.decode([0], ids, **OPTIONS) == "ab<tool call><é>"
    assert detokenizer.decode([0], ids, **{**OPTIONS, "skip_special_tokens": False}) == "a</s>b<tool call><é>"
    stream = detokenizer.stream([0], **OPTIONS)
    assert stream.preview(1, True) == "" and stream.preview(1, False) == "</s>"


def test_tokenizers_of_other_kinds_are_decoded_by_windows() -> None:
    detokenizer = make_detokenizer(SpacesOnlyTokenizer())
    assert isinstance(detokenizer, WindowDetokenizer)
    assert streamed(detokenizer, [0, 5], [6, 1, 3, 7]) == [" w6", "", "", " \ufffd w7"]
    assert streamed(detokenizer, [], [6, 7]) == ["w6", " w7"]


def test_a_window_ends_where_no_text_comes() -> None:
    asked = []

    class Spy(SpacesOnlyTokenizer):
        def decode(self, token_ids: list[int], skip_special_tokens: bool = False, **kwargs: object) -> str:
            asked.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens, **kwargs)

    pieces = streamed(WindowDetokenizer(Spy()), [5], [1] * 100 + [3] * 100 + [6])
    assert max(asked) <= 20
    assert "".join(pieces).count("\ufffd") == 100 and pieces[-1].endswith(" w6")
