"""The memory account: what weights, transients and KV cache take, settled before the first request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from taco.config import TacoConfig
from taco.errors import OutOfMemoryError
from taco.worker.kv_cache import KVCache

GIB = 1 << 30
DEFAULT_CPU_KV_BYTES = 4 * GIB
CPU_IDLE_PREFIX_BYTES = GIB // 2  # cached prefixes that nobody uses, kept as long as there is unused memory
LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}  # logits of one slice of rows, float32


def available_host_bytes() -> int:
    """Host memory that this process may still take: the machine's, or its control group's if that is less."""
    available = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return available
    return min(available, max(0, limit - used))


def logits_rows(vocab_size: int, device: str) -> int:
    """How many rows of float32 logits one slice of the sampler takes at most."""
    return max(1, LOGITS_BYTES[device] // (vocab_size * 4))


@dataclass(frozen=True)
class CacheGeometry:
    """The numbers a block's size follows from."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_bytes: int


def geometry(config: TacoConfig, model) -> CacheGeometry:  # noqa: ANN001
    """Cache numbers of a `taco.models.base.CausalLM`."""
    block_bytes = KVCache.bytes_per_block(
        model.num_layers,
        model.num_kv_heads,
        config.cache_config.block_size,
        model.head_dim,
        config.model_config.torch_dtype,
    )
    return CacheGeometry(model.num_layers, model.num_kv_heads, model.head_dim, block_bytes)


def num_blocks(config: TacoConfig, shape: CacheGeometry, budget_bytes: int) -> int:
    """Device blocks for a budget, block 0 included: no more than all rows at full length could use.

    Raises:
        OutOfMemoryError: one sequence of `max_model_len` tokens does not fit; the message gives arguments that work.
    """
    cache = config.cache_config
    max_model_len = config.scheduler_config.max_model_len
    needed = -(-max_model_len // cache.block_size) + 1
    useful = 1 + (needed - 1) * config.scheduler_config.max_num_seqs
    if cache.num_gpu_blocks_override is not None:
        count = cache.num_gpu_blocks_override
        source = f"num_gpu_blocks_override={count}"
    else:
        count = min(useful, budget_bytes // shape.block_bytes)
        source = f"a KV cache of {budget_bytes / GIB:.2f} GiB"
    fitting = (count - 1) * cache.block_size
    if count >= needed or (config.model_config.fit_max_model_len and fitting > 0):
        return count
    raise OutOfMemoryError(
        f"{source} holds {max(0, fitting)} tokens, but one sequence may have max_model_len={max_model_len} "
        f"({needed * shape.block_bytes / GIB:.2f} GiB, {shape.block_bytes} bytes for {cache.block_size} tokens). "
        f"Pass max_model_len={max(0, fitting)} or less"
        + (
            f", or num_gpu_blocks_override={needed} or more."
            if cache.num_gpu_blocks_override is not None
            else f", or kv_cache_memory_bytes={needed * shape.block_bytes} or more"
            + (", or a higher gpu_memory_utilization." if config.device_config.device == "cuda" else ".")
        )
    )


def cpu_kv_budget(config: TacoConfig) -> int:
    """Bytes of the KV cache on a CPU: as stated, else 4 GiB, else half of what is available.

    Raises:
        OutOfMemoryError: the stated size is more than there is.
    """
    stated = config.cache_config.kv_cache_memory_bytes or config.cache_config.cpu_kv_cache_bytes
    available = available_host_bytes()
    if stated is None:
        return min(DEFAULT_CPU_KV_BYTES, available // 2)
    if stated > available:
        raise OutOfMemoryError(
            f"a KV cache of {stated / GIB:.2f} GiB was asked for, but only {available / GIB:.2f} GiB of memory are "
            f"available: pass kv_cache_memory_bytes={available // 2} or less."
        )
    return stated
