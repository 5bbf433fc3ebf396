"""The tokens of a model as bytes, which is all that the libraries for guided decoding know of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from taco.guided.protocol import GrammarError
from taco.token_bytes import TokenPieces, byte_rules, sentencepiece_bytes

# Put before a text, it takes the space that some tokenizers put there; no vocabulary has longer tokens of it.
_MARK = "\x02"
_SHORT_TEXT = 64  # characters, up to which the tokens of a text are remembered
_MAX_KNOWN = 4096


class Vocabulary:
    """The bytes of each token, and how text is encoded.

    Args:
        tokens: bytes of each token id below the number of the model's logits; empty where a token is no text, which
            then no mask allows.
        special_tokens: names of the tokens that are no text but that a grammar may ask for by name, by their ids.
        eos_token_ids: tokens that end an output; they are no text.
        encode: from a text to token ids. What it gives is checked, and replaced where it does not spell the text.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_tokens: dict[int, str],
        eos_token_ids: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = list(tokens)
        self.special_tokens = dict(special_tokens)
        self.eos_token_ids = tuple(eos_token_ids)
        self._encode = encode
        # What grammars force is short and comes again and again: names of properties, with what is around them.
        self._known: dict[str, list[int]] = {}
        for token_id in (*self.special_tokens, *self.eos_token_ids):
            if token_id < len(self.tokens):
                self.tokens[token_id] = b""

    @property
    def size(self) -> int:
        """Number of token ids, which is that of the model's logits."""
        return len(self.tokens)

    @cached_property
    def ids_of_bytes(self) -> dict[bytes, list[int]]:
        """The token ids that stand for each string of bytes; tokens that are no text are left out."""
        ids: dict[bytes, list[int]] = {}
        for token_id, piece in enumerate(self.tokens):
            if piece:
                ids.setdefault(piece, []).append(token_id)
        return ids

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, as the tokenizer would write it inside a longer one; no special tokens.

        Bytes that no token has are left out.
        """
        found = self._known.get(text)
        if found is None:
            found = self._find_encoding(text)
            if len(text) <= _SHORT_TEXT:
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                self._known[text] = found
        return found.copy()

    def _find_encoding(self, text: str) -> list[int]:
        wanted = text.encode()
        for prefix in ("", _MARK):
            token_ids = self._encode(prefix + text)
            skipped = self._num_tokens_of_mark(token_ids) if prefix else 0
            if b"".join(self._bytes_of(token_ids[skipped:])) == wanted:
                return token_ids[skipped:]
        return self._encode_greedily(wanted)

    def _bytes_of(self, token_ids: Iterable[int]) -> list[bytes]:
        return [self.tokens[i] if i < len(self.tokens) else b"" for i in token_ids]

    def _num_tokens_of_mark(self, token_ids: Sequence[int]) -> int:
        """How many tokens the mark takes, with the space that the tokenizer put before it."""
        start = b""
        for count, piece in enumerate(self._bytes_of(token_ids), 1):
            start += piece
            if start.endswith(_MARK.encode()):
                return count
        return 0

    def _encode_greedily(self, data: bytes) -> list[int]:
        """Takes the longest token that fits, again and again."""
        token_ids: list[int] = []
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._max_token_bytes), start, -1):
                if found := self.ids_of_bytes.get(data[start:end]):
                    token_ids.append(found[0])
                    start = end
                    break
            else:
                start += 1
        return token_ids

    @cached_property
    def _max_token_bytes(self) -> int:
        return max(map(len, self.tokens))


def make_vocabulary(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """The vocabulary of a Hugging Face tokenizer, or of one of mistral-common.

    Args:
        vocab_size: number of the model's logits; ids from the tokenizer's own size on are padding.

    Raises:
        GrammarError: the tokens have no bytes of their own, so that no mask can be made.
    """
    rules = byte_rules(tokenizer)
    if rules is not None:
        pieces = TokenPieces(rules, skip_special_tokens=True)
        tokens = [pieces[token_id] for token_id in range(vocab_size)]
        added = rules.backend.get_added_tokens_decoder()
        contents = {token_id: token.content for token_id, token in added.items() if token.special}
        special = {
            i: text if isinstance(text, str) else text.decode("utf-8", "replace") for i, text in contents.items()
        }
    elif hasattr(tokenizer, "sp_model"):
        tokens, special = _tokens_of_sentencepiece(tokenizer, vocab_size)
    else:
        raise GrammarError(
            f"Guided decoding needs a tokenizer whose tokens stand for bytes; those of {type(tokenizer).__name__} do "
            'not, as they read differently after different neighbours. Use the fast tokenizer (tokenizer_mode="auto"), '
            "or run without a constraint."
        )
    eos_token_id = getattr(tokenizer, "eos_token_id", None)
    for name in ("unk", "pad", "bos", "eos"):
        token_id = getattr(tokenizer, f"{name}_token_id", None)
        if token_id is not None:
            special.setdefault(token_id, getattr(tokenizer, f"{name}_token"))
    return Vocabulary(
        tokens,
        {token_id: text for token_id, text in special.items() if token_id < vocab_size},
        [] if eos_token_id is None or eos_token_id >= vocab_size else [eos_token_id],
        _encoder(tokenizer),
    )


def _tokens_of_sentencepiece(tokenizer: Any, vocab_size: int) -> tuple[list[bytes], dict[int, str]]:
    """Bytes of the tokens, and names of the special ones, of a tokenizer in Python over a model of SentencePiece."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    added = {token_id: str(token) for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    special = {token_id: pieces[token_id] for token_id in tokenizer.all_special_ids if token_id < len(pieces)}
    tokens = [added[i].encode() if i in added else sentencepiece_bytes(piece) for i, piece in enumerate(pieces)]
    return tokens + [b""] * (vocab_size - len(tokens)), special


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    backend = getattr(tokenizer, "_tokenizer", None)
    if getattr(tokenizer, "is_fast", False) and backend is not None:

        def encode_fast(text: str) -> list[int]:
            token_ids: list[int] = backend.encode(text, add_special_tokens=False).ids
            return token_ids

        return encode_fast

    def encode(text: str) -> list[int]:
        token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    return encode
