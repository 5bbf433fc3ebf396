"""Tokenizers of mistral-common, in Mistral's own file formats and with Mistral's own encoding of chats.

transformers wraps them in a class with the methods of its tokenizers. Two traits differ from those: special tokens that
a text spells out are encoded as ordinary text, and there is no chat template.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_mistral_common import MistralCommonBackend

from taco.errors import TacoValidationError
from taco.token_bytes import sentencepiece_bytes


def load_mistral_tokenizer(path: str, **options: Any) -> MistralTokenizer:
    """Load the tokenizer of a model.

    Args:
        path: a folder with tekken.json, or with a sentencepiece model whose name ends in its version, such as
            tokenizer.model.v3; tekken.json counts if both are there.
        options: passed on to the tokenizer's class, such as `truncation_side`.

    Raises:
        TacoValidationError: there is no such file, or it cannot be used.
    """
    try:
        if not Path(path).is_dir():  # a name would be looked for on the Hub
            raise ValueError("it is no folder")
        return MistralTokenizer.from_pretrained(path, **options)
    except Exception as error:  # mistral-common raises errors of many classes
        raise TacoValidationError(
            f"{path} has no tokenizer that mistral-common can load, in tekken.json or tokenizer.model.vN ({error}); "
            'leave tokenizer_mode="auto", or pass tokenizer= with a folder or Hub id that has one.',
            parameter="tokenizer_mode",
            value=path,
        ) from error


class MistralTokenizer(MistralCommonBackend):
    """A tokenizer of mistral-common that takes the arguments of other Hugging Face tokenizers, and decodes by bytes."""

    is_fast = False

    def __call__(self, *args: Any, return_token_type_ids: bool = False, **kwargs: Any) -> Any:
        """As `MistralCommonBackend`; there are no token types to return."""
        return super().__call__(*args, **kwargs)

    def decode(self, token_ids: Any, *args: Any, spaces_between_special_tokens: bool = False, **kwargs: Any) -> Any:
        """As `MistralCommonBackend`; no spaces are put between tokens."""
        return super().decode(token_ids, *args, **kwargs)

    def _decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        # mistral-common writes texts with special tokens in the pieces of sentencepiece: "\u2581" for a space.
        vocabulary = self.byte_vocabulary
        special = vocabulary.get_added_tokens_decoder()
        ids = [int(token_id) for token_id in ([token_ids] if isinstance(token_ids, int) else token_ids)]
        pieces = [
            vocabulary.id_to_token(token_id) for token_id in ids if not (skip_special_tokens and token_id in special)
        ]
        text = b"".join(piece for piece in pieces if piece).decode("utf-8", "replace")
        if vocabulary.strips_first_space:
            text = text.removeprefix(" ")
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    @cached_property
    def byte_vocabulary(self) -> ByteVocabulary:
        """What its tokens stand for."""
        return ByteVocabulary(self)


AnyTokenizer = PreTrainedTokenizer | PreTrainedTokenizerFast | MistralTokenizer  # for annotations


@dataclass(frozen=True)
class SpecialToken:
    """A token that is no text."""

    content: bytes
    special: bool = True


class ByteVocabulary:
    """The bytes that each token stands for; tokens do not depend on their neighbours.

    Args:
        tokenizer: of either kind.
    """

    def __init__(self, tokenizer: MistralTokenizer) -> None:
        self._tokens = tokenizer.tokenizer.instruct_tokenizer.tokenizer
        self._num_tokens = len(tokenizer)
        self._is_sentencepiece = not hasattr(self._tokens, "id_to_byte_piece")
        self._special = {
            token_id: SpecialToken(self._tokens.id_to_piece(token_id).encode())
            for token_id in tokenizer.all_special_ids
        }

    @property
    def strips_first_space(self) -> bool:
        """Whether a text begins with a space that is none of its own."""
        return self._is_sentencepiece

    def get_added_tokens_decoder(self) -> dict[int, SpecialToken]:
        """The special tokens by their ids."""
        return self._special

    def id_to_token(self, token_id: int) -> bytes | None:
        """The bytes of a token; None for an id in the padding that models add to a vocabulary."""
        if token_id in self._special:
            return self._special[token_id].content
        if not 0 <= token_id < self._num_tokens:
            return None
        if not self._is_sentencepiece:
            piece: bytes = self._tokens.id_to_byte_piece(token_id)
            return piece
        return sentencepiece_bytes(self._tokens.id_to_piece(token_id))
