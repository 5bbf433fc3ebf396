from __future__ import annotations

import copy

import pytest

from taco.tokenizer.group import TokenizerGroup
from tests.tiny_tokenizers import byte_level_tokenizer


def test_a_group_is_one_tokenizer_for_all_requests() -> None:
    tokenizer = byte_level_tokenizer()
    group = TokenizerGroup(tokenizer)
    assert group.tokenizer is group.get_lora_tokenizer(object()) is tokenizer
    assert group.encode("hello", request_id="1", lora_request=None) == tokenizer.encode("hello")
    assert group.encode("hello", add_special_tokens=False) == tokenizer.encode("hello", add_special_tokens=False)
    assert group.get_max_input_len() is None


def test_a_group_has_the_attributes_of_its_tokenizer() -> None:
    tokenizer = byte_level_tokenizer()
    group = copy.copy(TokenizerGroup(tokenizer))
    assert group.eos_token_id == 1 and group.decode([5]) == tokenizer.decode([5])
    with pytest.raises(AttributeError, match="no_such_name"):
        group.no_such_name  # noqa: B018
    with pytest.raises(AttributeError):  # it would change nothing in the engine
        group.tokenizer = tokenizer  # type: ignore[misc]
