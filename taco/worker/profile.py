"""How much memory a step can take beside weights and KV cache, found by running the largest one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from taco.config import TacoConfig
from taco.kernels.metadata import AttentionMetadata, Workspace
from taco.worker import memory

if TYPE_CHECKING:
    from taco.models.base import CausalLM


def worst_case_bytes(config: TacoConfig, model: CausalLM, device: torch.device) -> int:
    """Peak CUDA memory, in bytes, of a step with `max_num_batched_tokens` tokens, above what is held now.

    Raises:
        OutOfMemoryError: the step does not fit beside the weights; the message gives arguments to try.
    """
    num_tokens = config.scheduler_config.max_num_batched_tokens
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    advice = (
        f"pass a smaller max_num_batched_tokens (it is {num_tokens}) or max_model_len (it is "
        f"{config.scheduler_config.max_model_len}), or free memory that other processes hold"
    )
    with memory.explain_device_memory(f"a step of {num_tokens} tokens", advice), _few_layers(model) as num_layers:
        for counts in _largest_steps(config):
            _run(config, model, num_layers, counts, device)
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - held
    torch.cuda.empty_cache()
    return peak


@contextmanager
def _few_layers(model: CausalLM) -> Iterator[int]:
    """Within this context the model has no more layers than a step needs to reach its peak; how many, it gives.

    What a layer leaves is what the next one takes. So the first one aside, which has no residual yet, layers that are
    made alike take the same memory, and one of each kind is enough.
    """
    layers = list(model.layers)
    kinds: dict[object, nn.Module] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer), layer)
    few = 2 * list(kinds.values()) if 2 * len(kinds) < len(layers) else layers
    kept = model.__dict__["layers"]
    model.__dict__["layers"] = few
    try:
        yield len(few) if model.num_layers else 0
    finally:
        model.__dict__["layers"] = kept


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """Equal for layers that do the same with other weights: modules, sizes and settings, but not the layer's number."""
    parts: list[object] = [(name, tuple(weight.shape), weight.dtype) for name, weight in layer.named_parameters()]
    for name, module in layer.named_modules():
        settings = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, type(None)))}
        settings.pop("layer_idx", None)
        parts.append((name, type(module), *sorted(settings.items(), key=str)))
    return tuple(parts)


def _largest_steps(config: TacoConfig) -> list[np.ndarray]:
    """How many tokens each row computes in the steps that can take most memory.

    One has as many tokens as a step may have, all of them at the end of rows that have their full length; the other as
    many rows as there may be, each with one token, and is a step of decoding.
    """
    scheduler = config.scheduler_config
    max_model_len = scheduler.max_model_len
    num_tokens = min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * max_model_len)
    counts = np.full(-(-num_tokens // max_model_len), max_model_len, np.int64)
    counts[0] -= counts.sum() - num_tokens  # the shortest first, as it may be a single token
    return [counts, np.ones(min(scheduler.max_num_seqs, num_tokens), np.int64)]


def _run(config: TacoConfig, model: CausalLM, num_layers: int, counts: np.ndarray, device: torch.device) -> None:
    """A step in which each row has its full length and computes its last `counts` tokens.

    Every row's block table repeats one block, so that no large cache is needed. A slice of logits follows, with what
    sampling takes beside it.
    """
    block_size = config.cache_config.block_size
    max_model_len = config.scheduler_config.max_model_len
    num_rows = len(counts)
    query_start = np.zeros(num_rows + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    seq_lens = np.full(num_rows, max_model_len, np.int32)
    positions = torch.from_numpy(np.concatenate([np.arange(max_model_len - n, max_model_len) for n in counts]))
    positions = positions.to(device)
    num_blocks = -(-max_model_len // block_size)
    meta = AttentionMetadata(
        query_start=torch.from_numpy(query_start).to(device),
        seq_lens=torch.from_numpy(seq_lens).to(device),
        block_tables=torch.ones(num_rows, num_blocks, dtype=torch.int32, device=device),
        slot_mapping=block_size + positions % block_size,
        query_start_cpu=query_start,
        seq_lens_cpu=seq_lens,
        num_decode_rows=int(np.count_nonzero(counts == 1)),
        block_size=block_size,
        workspace=Workspace(device),
    )
    dtype = config.model_config.dtype
    shape = (2, model.num_kv_heads, block_size, model.head_dim)
    layer = (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
    ids = torch.zeros(len(positions), dtype=torch.int64, device=device)
    hidden = model(ids, positions, [layer] * num_layers, meta)
    num_logits = memory.logits_rows(model.vocab_size, device.type, memory.least_logits_rows(config))
    logits = model.compute_logits(hidden[:num_logits])
    sampling_bytes = memory.sampling_bytes(config, len(logits), model.vocab_size, device.type)
    torch.empty(sampling_bytes - logits.nbytes, dtype=torch.uint8, device=device)
