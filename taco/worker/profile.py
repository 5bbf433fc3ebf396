"""How much memory a step can take beside weights and KV cache, found by running the largest one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

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
    with memory.explain_device_memory(f"a step of {num_tokens} tokens", advice):
        _run_largest_step(config, model, device)
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - held
    torch.cuda.empty_cache()
    return peak


def _run_largest_step(config: TacoConfig, model: CausalLM, device: torch.device) -> None:
    """As many tokens as a step may have, all of them at the end of rows that have their full length.

    Every row's block table repeats one block, so that no large cache is needed. A slice of logits follows, with three
    float32 copies of it: logits, the sorted or exponentiated copy, and their log-probabilities.
    """
    block_size = config.cache_config.block_size
    max_model_len = config.scheduler_config.max_model_len
    num_tokens = min(
        config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs * max_model_len
    )
    num_rows = -(-num_tokens // max_model_len)
    counts = np.full(num_rows, max_model_len, np.int64)
    counts[0] = num_tokens - (num_rows - 1) * max_model_len  # the shortest first, as it may be a single token
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
    dtype = config.model_config.torch_dtype
    shape = (2, model.num_kv_heads, block_size, model.head_dim)
    layer = (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    hidden = model(ids, positions, [layer] * model.num_layers, meta)
    logits = model.compute_logits(hidden[: memory.logits_rows(model.vocab_size, device.type)])
    copies = [torch.empty_like(logits) for _ in range(3)]
    del copies
