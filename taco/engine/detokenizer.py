"""From token ids to text, one token at a time or all at once; both give the same text.

The text of an output is what it adds to its prompt: the space at the start of a first word is kept, and a character
that the prompt's last token began is completed. A character whose last bytes are still to come is held back, and left
out if they never come. Bytes that cannot belong to any character become U+FFFD.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_PENDING = 3  # bytes of a UTF-8 character before its last one


class TextStream(Protocol):
    """The growing text of one output."""

    def append(self, token_id: int) -> str:
        """Takes the next token; returns the text that is certain now and was not before."""
        ...

    def preview(self, token_id: int, skip_special_tokens: bool) -> str:
        """What `append` would return, as special tokens are skipped or not; nothing changes."""
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
    vocabulary = getattr(tokenizer, "byte_vocabulary", None)
    if vocabulary is not None:
        return ByteDetokenizer(vocabulary, bytes, vocabulary.strips_first_space)
    backend = getattr(tokenizer, "_tokenizer", None)
    if getattr(tokenizer, "is_fast", False) and backend is not None and backend.decoder is not None:
        rules = _byte_rules(json.loads(backend.decoder.__getstate__()))
        if rules is not None:
            to_bytes, strips_first_space = rules
            return ByteDetokenizer(backend, to_bytes, strips_first_space)
    return WindowDetokenizer(tokenizer)


# Tokens as bytes


def _byte_rules(decoder: dict[str, Any]) -> tuple[Callable[[str], bytes], bool] | None:
    """How a decoder of the `tokenizers` library turns a token into bytes, if it treats every token on its own.

    Returns:
        The function from a token's string to its bytes, and whether a space at the very start of a text is dropped;
        None if the decoder is of another kind.
    """
    if decoder["type"] == "ByteLevel":
        return _byte_level_bytes, False
    steps = decoder.get("decoders", [])
    replacements: list[tuple[str, str]] = []
    byte_fallback = strips_first_space = fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"] and not (byte_fallback or fused):
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback" and not (byte_fallback or fused):
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            strips_first_space = True
        else:
            return None
    if not fused:
        return None

    def to_bytes(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode("utf-8", "replace")

    return to_bytes, strips_first_space


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE (Radford et al., GPT-2, 2019).

    Printable characters of Latin-1 stand for themselves; the other 68 bytes get the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # not written in the alphabet of bytes
        return token.encode("utf-8", "replace")


class _Pieces(dict[int, bytes]):
    """Bytes of each token id, found when first asked for: large vocabularies take too long to convert at the start."""

    def __init__(self, backend: Any, to_bytes: Callable[[Any], bytes], skip_special_tokens: bool) -> None:
        self._id_to_token = backend.id_to_token
        self._to_bytes = to_bytes
        for token_id, token in backend.get_added_tokens_decoder().items():
            hidden = skip_special_tokens and token.special
            # Byte-level BPE does not write added tokens in its alphabet of bytes.
            is_plain = to_bytes is _byte_level_bytes
            content = token.content.encode("utf-8", "replace") if is_plain else to_bytes(token.content)
            self[token_id] = b"" if hidden else content

    def __missing__(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id)  # None in the padding that models add to a vocabulary
        piece = self[token_id] = b"" if token is None else self._to_bytes(token)
        return piece


class _Texts(dict[int, str]):
    """Text of each token id on its own, as far as its bytes are whole characters."""

    def __init__(self, pieces: _Pieces) -> None:
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
        backend: a `tokenizers.Tokenizer`, or a `ByteVocabulary` of a tokenizer of mistral-common.
        to_bytes: from a token, as the backend gives it, to its bytes.
        strips_first_space: whether the tokenizer drops a space at the very start of a text.
    """

    def __init__(self, backend: Any, to_bytes: Callable[[Any], bytes], strips_first_space: bool) -> None:
        self._pieces = {skip: _Pieces(backend, to_bytes, skip) for skip in (False, True)}
        self._texts = {skip: _Texts(pieces) for skip, pieces in self._pieces.items()}
        self._strips_first_space = strips_first_space

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
        pieces: dict[bool, _Pieces],
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

    def preview(self, token_id: int, skip_special_tokens: bool) -> str:
        if not self._pending and not self._trim:
            return self._texts[skip_special_tokens][token_id]
        text = _decode_utf8(self._pending + self._pieces_all[skip_special_tokens][token_id])[0]
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

    def preview(self, token_id: int, skip_special_tokens: bool) -> str:
        must_end = len(self._new) + 1 >= self._MAX_HELD_TOKENS
        return self._added_text([*self._new, token_id], skip_special_tokens, must_end)

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
