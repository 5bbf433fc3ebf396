"""Tiny random pooling models in folders, and what transformers makes of their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny_tokenizers import byte_level_tokenizer

TEXTS = ["hello world", "the cat sat on the mat and the hat, " * 4, "a", "naïve café. " * 3, "hello world"]

FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "modernbert": {"num_hidden_layers": 4, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 1},
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 5},
    "gpt2": {},
    "qwen2": {"num_key_value_heads": 2},
    "opt": {"word_embed_proj_dim": 20, "do_layer_norm_before": False, "ffn_dim": 56},
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert")


@torch.no_grad()
def save_model(folder: Path, model_type: str, auto_class: str = "AutoModel", **settings: Any) -> Any:
    """Saves a model with random weights, and a tokenizer, and returns transformers' model in float32."""
    tokenizer = byte_level_tokenizer(None)
    base: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    if model_type == "gpt2":
        base |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 130}
    else:
        base |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 130}
        base |= {} if model_type == "opt" else {"intermediate_size": 48}
    config = transformers.AutoConfig.for_model(model_type, **(base | FAMILIES[model_type] | settings))
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config, attn_implementation="eager", dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        else:
            parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def hidden_states(model: Any, token_ids: list[int], **inputs: Any) -> torch.Tensor:
    """float32 [tokens, hidden_size] of the bare model."""
    inputs = {name: torch.tensor([value]) for name, value in inputs.items()}
    return model(torch.tensor([token_ids]), **inputs).last_hidden_state[0]


@torch.no_grad()
def logits_of(model: Any, token_ids: list[int], **inputs: Any) -> torch.Tensor:
    """float32 [labels] or [tokens, labels] of a classifier."""
    inputs = {name: torch.tensor([value]) for name, value in inputs.items()}
    return model(torch.tensor([token_ids]), **inputs).logits[0]


def write_sentence_transformers_files(
    folder: Path,
    *,
    pooling: dict[str, Any] | None = None,
    normalize: bool = True,
    transformer: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    projections: tuple[str, ...] = (),
) -> None:
    """modules.json and what it names, as sentence-transformers saves them."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *((name, "Dense") for name in projections)]
    if normalize:
        kinds.append((f"{len(kinds)}_Normalize", "Normalize"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    if transformer is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps(transformer))
    if settings is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
