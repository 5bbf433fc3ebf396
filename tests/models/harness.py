"""Runs a model of taco in packed batches, without an engine, and builds tiny random models of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from taco.kernels.metadata import AttentionMetadata, Workspace
from taco.models.base import CausalLM
from taco.models.loader.apply import load_weights
from taco.models.loader.checkpoint import TensorInfo
from taco.models.registry import resolve_model_class


class DictCheckpoint:
    """A checkpoint in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def infos(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def close(self) -> None:
        pass


def tiny_config(model_type: str, **settings: Any) -> transformers.PretrainedConfig:
    """A configuration of a tiny model; settings of None stay None, other defaults are those of transformers."""
    base: dict[str, Any] = {"vocab_size": 211, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if model_type == "gpt2":
        base |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
    else:
        base |= {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 96,
        }
        base |= {"ffn_dim": 56} if model_type == "opt" else {"intermediate_size": 56, "num_key_value_heads": 2}
    return transformers.AutoConfig.for_model(model_type, **(base | settings))


@torch.no_grad()
def random_reference(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' model in float32 with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # weights of norms, and biases
            parameter.add_(torch.randn_like(parameter) * 0.3)
        else:
            parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def load(
    reference: transformers.PreTrainedModel, *, dtype: torch.dtype = torch.float32, max_model_len: int | None = None
) -> CausalLM:
    """taco's model with the weights of transformers' model."""
    return load_tensors(reference.config, reference.state_dict(), dtype=dtype, max_model_len=max_model_len)


def load_tensors(
    config: transformers.PretrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    max_model_len: int | None = None,
) -> CausalLM:
    with torch.device("meta"):
        model = resolve_model_class(config)(config)
    load_weights(
        model, model.weight_entries(), DictCheckpoint(tensors), device="cpu", dtype=dtype, ignore=model.ignored_weights
    )
    model.finalize(max_model_len)
    return model


@torch.no_grad()
def reference_logits(reference: transformers.PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [len(token_ids), vocab_size] of all positions, computed in one go."""
    return reference(input_ids=torch.tensor([list(token_ids)])).logits[0].float()


def reference_greedy(
    reference: transformers.PreTrainedModel, prompt: Sequence[int], num_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation, and the logits of the last prompt position and of all but the last new token."""
    tokens, logits = list(prompt), []
    for _ in range(num_tokens):
        logits.append(reference_logits(reference, tokens)[-1])
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(logits)


class Runner:
    """A KV cache, and rows whose tokens are computed step by step in packed batches."""

    def __init__(self, model: CausalLM, *, dtype: torch.dtype = torch.float32, block_size: int = 4) -> None:
        self.model = model
        self.block_size = block_size
        self.num_blocks = 128
        shape = (self.num_blocks, model.num_kv_heads, block_size, model.head_dim)
        self.kv_caches = [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(model.num_layers)
        ]
        # Block 0 belongs to nobody; the others are handed out in an order that no row has contiguous blocks.
        self.free_blocks = [*range(2, self.num_blocks, 2), *range(1, self.num_blocks, 2)]
        self.blocks: dict[int, list[int]] = {}
        self.num_computed: dict[int, int] = {}
        self.workspace = Workspace("cpu")

    @torch.no_grad()
    def step(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """Computes the next tokens of some rows; returns the logits of all their positions, [tokens, vocab_size]."""
        rows = sorted(tokens, key=lambda row: len(tokens[row]) > 1)
        positions: list[int] = []
        slots: list[int] = []
        for row in rows:
            start = self.num_computed.get(row, 0)
            blocks = self.blocks.setdefault(row, [])
            for position in range(start, start + len(tokens[row])):
                if position == len(blocks) * self.block_size:
                    blocks.append(self.free_blocks.pop())
                positions.append(position)
                slots.append(blocks[position // self.block_size] * self.block_size + position % self.block_size)
            self.num_computed[row] = start + len(tokens[row])
        query_start = np.cumsum([0, *(len(tokens[row]) for row in rows)], dtype=np.int32)
        seq_lens = np.array([self.num_computed[row] for row in rows], dtype=np.int32)
        tables = torch.zeros(len(rows), max(len(self.blocks[row]) for row in rows), dtype=torch.int32)
        for index, row in enumerate(rows):
            tables[index, : len(self.blocks[row])] = torch.tensor(self.blocks[row], dtype=torch.int32)
        meta = AttentionMetadata(
            query_start=torch.from_numpy(query_start),
            seq_lens=torch.from_numpy(seq_lens),
            block_tables=tables,
            slot_mapping=torch.tensor(slots),
            query_start_cpu=query_start,
            seq_lens_cpu=seq_lens,
            num_decode_rows=sum(len(tokens[row]) == 1 for row in rows),
            block_size=self.block_size,
            workspace=self.workspace,
        )
        input_ids = torch.tensor([token for row in rows for token in tokens[row]])
        hidden = self.model(input_ids, torch.tensor(positions), self.kv_caches, meta)
        logits = self.model.compute_logits(hidden)
        return {row: logits[query_start[index] : query_start[index + 1]] for index, row in enumerate(rows)}

    def greedy(self, prompts: Mapping[int, Sequence[int]], num_tokens: int) -> dict[int, list[int]]:
        """Computes prompts in one step, then decodes all rows together."""
        generated: dict[int, list[int]] = {row: [] for row in prompts}
        pending: Mapping[int, Sequence[int]] = prompts
        for _ in range(num_tokens):
            logits = self.step(pending)
            for row in prompts:
                generated[row].append(int(logits[row][-1].argmax()))
            pending = {row: generated[row][-1:] for row in prompts}
        return generated
