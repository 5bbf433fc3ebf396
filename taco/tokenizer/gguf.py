"""The tokenizer in the metadata of a GGUF file.

Two kinds are built, as `tokenizers` pipelines: byte-level BPE ("gpt2") and the BPE of sentencepiece ("llama"). The
names of the pre-tokenizers and the expressions behind them are those of llama.cpp (src/llama-vocab.cpp) and of the
tokenizer.json of the models.

The token ids of byte-level vocabularies are those of the tokenizer that the model was published with. Those of
sentencepiece vocabularies are those of transformers' conversion of the same file, which departs from the published
tokenizer in two rare cases: Gemma divides runs of more than 31 spaces differently, and Llama puts no space before a
text that begins with one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader.gguf_file import GGUFHeader
from taco.models.loader.source import gguf_header

# Token types (tokenizer.ggml.token_type).
_MAX_TOKEN_CHARS = 10_000
_NORMAL = 1
_CONTROL = 3
_USER_DEFINED = 4

_SPACE = "\u2581"  # what sentencepiece writes for a space

# Expressions that split a text before byte-level BPE.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """What tokenizer.ggml.pre stands for.

    Attributes:
        split: the expression; its matches are the words.
        digits: every digit is a word of its own, before anything else.
        ignore_merges: a word that is a token is that token, whatever the merges say.
        nfc: the text is normalised to NFC.
        add_bos: texts begin with the BOS token where the file does not say.
    """

    split: str
    digits: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


_GPT2 = _PreTokenizer(_GPT2_SPLIT)
_LLAMA3 = _PreTokenizer(_LLAMA3_SPLIT, ignore_merges=True, add_bos=True)
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _PreTokenizer(_GPT2_SPLIT, digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _PreTokenizer(_LLAMA3_SPLIT),
    "dbrx": _PreTokenizer(_LLAMA3_SPLIT),
    "qwen2": _PreTokenizer(_QWEN2_SPLIT, nfc=True),
    "deepseek-r1-qwen": _PreTokenizer(_QWEN2_SPLIT),
    "tekken": _PreTokenizer(_TEKKEN_SPLIT, ignore_merges=True, add_bos=True),
    "gpt-4o": _PreTokenizer(_GPT4O_SPLIT),
}


def build_gguf_tokenizer(path: str, **options: Any) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a GGUF file.

    Args:
        path: the file.
        options: passed on to PreTrainedTokenizerFast, e.g. truncation_side.

    Raises:
        UnsupportedFeatureError: another kind of tokenizer, or an unknown pre-tokenizer.
        TacoValidationError: the file has no tokenizer, or a damaged one.
    """
    header = gguf_header(path)
    model = header.metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedFeatureError(
            f"{path} has {'no tokenizer' if model is None else f'a tokenizer of the kind {model!r}'}; these kinds can "
            "be read: gpt2 (byte-level BPE), llama (sentencepiece BPE). Pass tokenizer= with the folder or Hub id of "
            "the original model.",
            parameter="tokenizer",
            value=path,
        )
    tokens = _require(header, "tokens")
    types = header.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not (types is None or isinstance(types, list)):
        raise TacoValidationError(f"{path} is damaged: its tokens and their types are no lists.")
    types = types or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise TacoValidationError(f"{path} is damaged: it has {len(tokens)} tokens and {len(types)} token types.")
    try:
        if model == "gpt2":
            tokenizer, add_bos = _byte_level_bpe(header, tokens)
        else:
            tokenizer, add_bos = _sentencepiece_bpe(header, tokens, types), True
    except TacoValidationError:
        raise
    except Exception as error:  # the class that tokenizers raises
        raise TacoValidationError(f"{path} has a damaged tokenizer: {error}") from error

    control = _add_tokens(tokenizer, tokens, types)
    metadata = header.metadata
    return PreTrainedTokenizerFast(
        tokenizer_object=_Given(tokenizer),
        bos_token=_special(header, tokens, "bos"),
        eos_token=_special(header, tokens, "eos"),
        unk_token=_special(header, tokens, "unknown"),
        pad_token=_special(header, tokens, "padding"),
        extra_special_tokens=control,
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        chat_template=_chat_template(metadata),
        clean_up_tokenization_spaces=False,
        **options,
    )


class _Given:
    """PreTrainedTokenizerFast copies its tokenizer deeply, which can take seconds; a copy of this is the original."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self._tokenizer


def _byte_level_bpe(header: GGUFHeader, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise UnsupportedFeatureError(
            f"{header.path} splits texts with the pre-tokenizer {name!r} (tokenizer.ggml.pre); these are known: "
            f"{', '.join(_PRE_TOKENIZERS)}. Pass tokenizer= with the folder or Hub id of the original model.",
            parameter="tokenizer",
            value=header.path,
        )
    pre = _PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in _require(header, "merges")]
    tokenizer = Tokenizer(BPE(vocab=_vocabulary(tokens), merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece_bpe(header: GGUFHeader, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    vocab = _vocabulary(_spell_spaces(tokens))
    # Elsewhere the scores rule, but those of Gemma (-1000) would rank its runs of spaces behind all words.
    by_id = header.architecture.startswith("gemma")
    scores = range(0, -len(tokens), -1) if by_id else _require(header, "scores")
    if len(scores) != len(tokens):
        raise TacoValidationError(f"{header.path} is damaged: it has {len(tokens)} tokens and {len(scores)} scores.")
    model = BPE(
        vocab=vocab,
        merges=_merges_of_scores(vocab, types, scores),
        unk_token=_special(header, tokens, "unknown"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if not header.metadata.get("tokenizer.ggml.add_space_prefix", not by_id):
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    else:
        if header.architecture == "phi3":  # its tokenizer.json puts the space before a text that begins with one, too
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
        steps.append(decoders.Strip(" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_of_scores(vocab: Mapping[str, int], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary implies, best first.

    sentencepiece joins the neighbours whose union is the piece with the best score, the leftmost first where several
    pieces have it. So every division of a piece into two pieces is a merge with the rank of its score. Among equal
    scores, which runs of spaces have, a longer left part goes first: then they grow from the left, too.
    """
    longest = max(map(len, vocab), default=0)
    if longest > _MAX_TOKEN_CHARS:
        raise TacoValidationError(
            f"The vocabulary of the GGUF file is damaged: it has a token of {longest} characters."
        )
    mergeable = [(-scores[i], token) for token, i in vocab.items() if types[i] in (_NORMAL, _USER_DEFINED)]
    mergeable.sort(key=itemgetter(0))
    merges: list[tuple[str, str]] = []
    for _, equal in groupby(mergeable, key=itemgetter(0)):
        first, tokens = len(merges), [token for _, token in equal]
        for token in tokens:
            for cut in range(len(token) - 1, 0, -1):
                if (left := token[:cut]) in vocab and (right := token[cut:]) in vocab:
                    merges.append((left, right))
        if len(tokens) > 1:
            merges[first:] = sorted(merges[first:], key=lambda pair: (-len(pair[0]), -len(pair[1])))
    return merges


def _spell_spaces(tokens: Sequence[str]) -> list[str]:
    """Runs of spaces, which converters write as they are, in the spelling of sentencepiece."""
    return [token.replace(" ", _SPACE) if token.startswith(" ") and not token.strip(" ") else token for token in tokens]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Ids of the tokens; of two equal tokens, the first is meant."""
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocab.setdefault(token, i)
    return vocab


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """Make control and user-defined tokens match in texts before anything else; return the control tokens."""
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    # Runs of spaces are respelled in a sentencepiece vocabulary, where merges find them.
    user_defined = [
        AddedToken(token, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ == _USER_DEFINED and tokenizer.token_to_id(token) is not None
    ]
    tokenizer.add_tokens(user_defined)
    return control


def _special(header: GGUFHeader, tokens: Sequence[str], name: str) -> str | None:
    token_id = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise TacoValidationError(
            f"{header.path} is damaged: its {name} token has the id {token_id}, and there are {len(tokens)} tokens."
        )
    return tokens[token_id]


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or all by name where the file has several."""
    default = metadata.get("tokenizer.chat_template")
    named = {
        name: metadata[f"tokenizer.chat_template.{name}"]
        for name in metadata.get("tokenizer.chat_templates", ())
        if f"tokenizer.chat_template.{name}" in metadata
    }
    if not named:
        return default
    return named if default is None else {"default": default, **named}


def _require(header: GGUFHeader, key: str) -> Any:
    value = header.metadata.get(f"tokenizer.ggml.{key}")
    if not value:
        raise TacoValidationError(f"{header.path} has no tokenizer.ggml.{key}; convert the model again.")
    return value
