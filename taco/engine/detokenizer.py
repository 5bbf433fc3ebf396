"""From token ids to text, one token at a time or all at once; both give the same text.

The text of an output is what it adds to its prompt: the space at the start of a first word is kept, and a character
that the prompt's last token began is completed. A character whose last bytes are still to come is held back, and left
out if they never come. Bytes that cannot belong to any character become U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from taco.token_bytes import ByteRules, TokenPieces, byte_rules

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING = 3  # bytes of a UTF-8 character before its last one


class TextStream(Protocol):
    """The growing text of one output."""

    def append(self, token_id: int) -> str:
        """Takes the next token; returns the text that is certain now and was not before."""
        ...

    def preview(self, token_id: int, skip_special_tokens: bool, in_context: bool = True) -> str:
        """What `append` would return, as special tokens are skipped or not; nothing changes.

        Args:
            in_context: text that was held back belongs to it in any case; else only if the token goes on with the
                character that was begun.
        """
        ...


class Detokenizer(Protocol):
    """Turns token ids of one tokenizer into text."""

    def stream(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> TextStream:
        """A stream for an output that follows `prompt_token_ids`."""
        ...

    def decode(
        self,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> str:
        """The whole text of an output; equals the joined results of `append`."""
        ...


def make_detokenizer(tokenizer: Any) -> Detokenizer:
    """The detokenizer for a Hugging Face tokenizer.

    Tokenizers whose tokens stand for bytes, independent of their neighbours (byte-level BPE; SentencePiece with or
    without byte fallback; those of mistral-common), are decoded through a table of bytes. All others are asked to
    decode short windows.
    """
    rules = byte_rules(tokenizer)
    return WindowDetokenizer(tokenizer) if rules is None else ByteDetokenizer(rules)


# Tokens as bytes


class _Texts(dict[int, str]):
    """Text of each token id on its own, as far as its bytes are whole characters."""

    def __init__(self, pieces: TokenPieces) -> None:
        self._pieces = pieces

    def __missing__(self, token_id: int) -> str:
        text = self[token_id] = _decode_utf8(self._pieces[token_id])[0]
        return text


def _decode_utf8(data: bytes) -> tuple[str, int]:
    """Text of the whole characters in `data`, and how many bytes they take; the rest may still become a character."""
    return codecs.utf_8_decode(data, "replace", False)


class ByteDetokenizer:
    """For tokenizers whose tokens stand for bytes.

    Args:
        rules: how its tokens become bytes.
    """

    def __init__(self, rules: ByteRules) -> None:
        self._pieces = {skip: TokenPieces(rules, skip) for skip in (False, True)}
        self._texts = {skip: _Texts(pieces) for skip, pieces in self._pieces.items()}
        self._strips_first_space = rules.strips_first_space

    def stream(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> ByteStream:
        return ByteStream(
            self._pieces, self._texts, skip_special_tokens, *self._start(prompt_token_ids, skip_special_tokens)
        )

    def decode(
        self,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> str:
        pending, trim = self._start(prompt_token_ids, skip_special_tokens)
        pieces = self._pieces[skip_special_tokens]
        text = _decode_utf8(pending + b"".join(map(pieces.__getitem__, token_ids)))[0]
        return text[1:] if trim and text.startswith(trim) else text

    def _start(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> tuple[bytes, str]:
        """What an output inherits from its prompt.

        Returns:
            The bytes of the character that the prompt leaves unfinished, and the character that is removed where the
            output's text begins with it: the prompt's unfinished one if it stays so, or a space to be dropped.
        """
        pieces = self._pieces[skip_special_tokens]
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = pieces[token_id] + tail
            if len(tail) >= _MAX_PENDING:
                break
        if not tail:
            return b"", " " if self._strips_first_space else ""
        pending = tail[_decode_utf8(tail)[1] :]
        return pending, _REPLACEMENT if pending else ""


class ByteStream:
    """The text of one output; made by `ByteDetokenizer.stream`."""

    __slots__ = ("_pending", "_pieces", "_pieces_all", "_skip", "_texts", "_trim")

    def __init__(
        self,
        pieces: dict[bool, TokenPieces],
        texts: dict[bool, _Texts],
        skip_special_tokens: bool,
        pending: bytes,
        trim: str,
    ) -> None:
        self._pieces_all = pieces
        self._pieces = pieces[skip_special_tokens]
        self._texts = texts
        self._skip = skip_special_tokens
        self._pending = pending
        self._trim = trim

    def append(self, token_id: int) -> str:
        data = self._pending + self._pieces[token_id]
        text, consumed = _decode_utf8(data)
        self._pending = data[consumed:]
        if text and self._trim:
            if text.startswith(self._trim):
                text = text[1:]
            self._trim = ""
        return text

    def preview(self, token_id: int, skip_special_tokens: bool, in_context: bool = True) -> str:
        if not self._pending and not self._trim:
            return self._texts[skip_special_tokens][token_id]
        piece = self._pieces_all[skip_special_tokens][token_id]
        goes_on = bool(piece) and 0x80 <= piece[0] < 0xC0  # with a byte that is not the first of a character
        if self._pending and not in_context and not goes_on:
            return self._texts[skip_special_tokens][token_id]
        text = _decode_utf8(self._pending + piece)[0]
        return text[1:] if self._trim and text.startswith(self._trim) else text


# Any tokenizer


class WindowDetokenizer:
    """For tokenizers that only promise to decode lists of ids: Python ones, and those with unusual decoders.

    Args:
        tokenizer: has `decode(ids, skip_special_tokens=...)` of Hugging Face tokenizers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def stream(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> WindowStream:
        return WindowStream(self._tokenizer, prompt_token_ids, skip_special_tokens, spaces_between_special_tokens)

    def decode(
        self,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> str:
        stream = self.stream(
            prompt_token_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )
        return "".join(map(stream.append, token_ids))


class WindowStream:
    """Decodes the last few tokens together with the ones before them, whose text is known, and takes the difference.

    How a token reads can depend on its predecessors (spaces between words, bytes of one character), but hardly on more
    than the last few. The difference is taken once the window's text ends in a whole character.
    """

    _NUM_CONTEXT_TOKENS = 6
    _MAX_HELD_TOKENS = 8  # a character has at most four bytes; what is longer will not become one

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._known: list[int] = []  # tokens whose text was given out, as context
        self._known_text = ""
        self._new: list[int] = []  # tokens whose text is held back
        # A context that shows no text (special tokens alone) would make the first word look like the start of a text.
        length = self._NUM_CONTEXT_TOKENS
        while prompt_token_ids and not self._known_text:
            self._known = list(prompt_token_ids[-length:])
            self._known_text = self._decode(self._known, skip_special_tokens)
            if length >= len(prompt_token_ids):
                break
            length *= 4

    def append(self, token_id: int) -> str:
        self._new.append(token_id)
        must_end = len(self._new) >= self._MAX_HELD_TOKENS
        text = self._added_text(self._new, self._skip, must_end)
        if text:
            self._known = self._new
            self._known_text = self._decode(self._known, self._skip)
        if text or must_end:
            self._new = []  # without text these are tokens that do not show
        return text

    def preview(self, token_id: int, skip_special_tokens: bool, in_context: bool = True) -> str:
        held = self._new
        if held and not in_context:
            alone = self._decode([token_id], skip_special_tokens)
            held = held if alone.startswith(_REPLACEMENT) else []
        must_end = len(held) + 1 >= self._MAX_HELD_TOKENS
        return self._added_text([*held, token_id], skip_special_tokens, must_end)

    def _added_text(self, new: list[int], skip_special_tokens: bool, must_end: bool) -> str:
        text = self._decode(self._known + new, skip_special_tokens)
        known_text = self._known_text
        if skip_special_tokens != self._skip:
            known_text = self._decode(self._known, skip_special_tokens)
        if text.endswith(_REPLACEMENT) and not must_end:
            return ""
        return text[len(known_text) :]

    def _decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=self._spaces,
        )
        return text
