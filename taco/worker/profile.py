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

    The step is one row of prompt, then a slice of logits with three float32 copies of it: logits, the sorted or
    exponentiated copy, and their log-probabilities.
    """
    block_size = config.cache_config.block_size
    num_tokens = min(config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_model_len)
    num_blocks = -(-num_tokens // block_size) + 1
    shape = (num_blocks, model.num_kv_heads, block_size, model.head_dim)
    dtype = config.model_config.torch_dtype
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    layer = (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
    cache_bytes = torch.cuda.memory_allocated(device) - held
    query_start = np.array([0, num_tokens], np.int32)
    seq_lens = np.array([num_tokens], np.int32)
    meta = AttentionMetadata(
        query_start=torch.from_numpy(query_start).to(device),
        seq_lens=torch.from_numpy(seq_lens).to(device),
        block_tables=torch.arange(1, num_blocks, dtype=torch.int32, device=device)[None],
        slot_mapping=torch.arange(num_tokens, device=device) + block_size,
        query_start_cpu=query_start,
        seq_lens_cpu=seq_lens,
        num_decode_rows=0,
        block_size=block_size,
        workspace=Workspace(device),
    )
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    positions = torch.arange(num_tokens, device=device)
    hidden = model(ids, positions, [layer] * model.num_layers, meta)
    num_rows = min(memory.logits_rows(model.vocab_size, "cuda"), num_tokens)
    logits = model.compute_logits(hidden[:num_rows])
    copies = [torch.empty_like(logits) for _ in range(3)]
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - held - cache_bytes
    del layer, hidden, logits, copies
    torch.cuda.empty_cache()
    return peak
