"""A Llama of random weights that is nearly indifferent between tokens, over tokens that cross the borders of JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_POSITIONS = 1024
BOS, EOS = 0, 1
PROMPT = [5, 6]
# Texts whose frequent pairs become tokens: two bytes of a character, the end of a string with what follows, digits.
CORPUS = [
    '{"a": 1, "b": [true, false, null]}',
    '[{"a":12,"b":-1.5e+3},{"a":13}]',
    '{"a":{"a":{}},"b":[],"c":""}',
    '"2024-01-02T03:04:05Z"',
    "é日本😀 \\u00e9\\n ab abc",
    'SELECT a, b FROM c WHERE a = "b";',
]


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: <s> = 0, </s> = 1, <pad> = 2, 256 bytes, some merges that no word boundary stops."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        max_token_length=4,
        special_tokens=[AddedToken(text, special=True) for text in ("<s>", "</s>", "<pad>")],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def save_model(folder: Path, made: PreTrainedTokenizerFast | None = None, eos_token_id: int | None = EOS) -> Path:
    """Writes model and tokenizer to a folder."""
    made = made or tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(made) + 3,  # as in published models there are logits without a token
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=NUM_POSITIONS,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def closing_bias(strength: float = 4.0) -> dict[int, float]:
    """A `logit_bias` with which strings, arrays and objects end after a few tokens."""
    return {tokenizer().encode(text, add_special_tokens=False)[0]: strength for text in ('"', "]", "}")}


def steered(text: str, strength: float = 30.0, by_bytes: bool = False) -> Callable[[Sequence[int], Any], Any]:
    """A logits processor under which a model wants nothing but this text, whatever it has been made to write so far."""
    vocabulary = tokenizer().get_vocab()
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = "".join(word for word, _ in pre_tokenizer.pre_tokenize_str(text))  # one for each byte
    names = tokenizer().convert_ids_to_tokens(list(range(len(tokenizer()))))
    longest = 1 if by_bytes else max(map(len, names[EOS + 2 :]))

    def process(output_token_ids: Sequence[int], logits: Any) -> Any:
        written = sum(len(names[token_id]) for token_id in output_token_ids)
        wanted = EOS
        for end in range(min(written + longest, len(letters)), written, -1):
            if letters[written:end] in vocabulary:
                wanted = vocabulary[letters[written:end]]
                break
        logits[wanted] += strength
        return logits

    return process
