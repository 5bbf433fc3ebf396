"""The memory account: what weights, transients and KV cache take, settled before the first request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from taco.config import TacoConfig
from taco.errors import OutOfMemoryError
from taco.layers.linear import MergedLinear
from taco.worker.kv_cache import KVCache
from taco.worker.sampler import watermark
from taco.worker.sampler.sampler import BLOCK_ENTRIES, BLOCK_ENTRIES_CPU

GIB = 1 << 30
MIB = 1 << 20
DEFAULT_CPU_KV_BYTES = 4 * GIB
CPU_IDLE_PREFIX_BYTES = GIB // 2  # cached prefixes that nobody uses, kept as long as there is unused memory
LOGITS_COPIES = 4  # of a slice of logits, float32, that sampling makes at most, as it handles smaller blocks of it
WHOLE_LOGITS_COPIES = 8  # where the slice is one such block
SORTED_LOGITS_COPIES = 12  # where the whole block is sorted, as it is to be returned
SCORE_BYTES = 24  # of one log-probability on its way to the host, and its token id
LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}  # logits of one slice of rows, float32


class _GroupFiles(NamedTuple):
    """Where a version of control groups says what.

    Args:
        line: how the line of /proc/self/cgroup that names the group begins, after the number of the hierarchy.
        folder: of the hierarchy.
        limit, used: files of a group.
        prefix: of the entries of memory.stat that count the groups within it, too.
    """

    line: str
    folder: str
    limit: str
    used: str
    prefix: str


_GROUP_FILES = (
    _GroupFiles("", ".", "memory.max", "memory.current", ""),
    _GroupFiles("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
)


def available_host_bytes(
    control_groups: Path = Path("/sys/fs/cgroup"), own_groups: Path = Path("/proc/self/cgroup")
) -> int:
    """Host memory that this process may still take: the machine's, or less where its control groups leave less.

    Args:
        control_groups: where control groups, of version 2 or 1, are mounted.
        own_groups: file that names the groups of this process.
    """
    available = psutil.virtual_memory().available
    for files in _GROUP_FILES:
        for group in _enclosing_groups(control_groups / files.folder, own_groups, files.line):
            try:
                limit = int((group / files.limit).read_text())
                used = int((group / files.used).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # the group is not visible here, or it has no limit ("max")
                continue
            # Copies of files in memory count as used, but are dropped when memory is needed.
            reclaimable = sum(int(stat.get(f"{files.prefix}{name}_file", 0)) for name in ("inactive", "active"))
            available = min(available, max(0, limit - used + reclaimable))
    return available


def _enclosing_groups(root: Path, own_groups: Path, controller: str) -> list[Path]:
    """Folders of the process's control group and of the groups around it, of which each may have a limit."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return []
    named = (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2)
    path = next((path for controllers, path in named if controller in controllers.split(",")), "")
    if ".." in path.split("/"):  # outside of what a container sees; the root is what it sees of its own group
        path = ""
    group = root / path.lstrip("/")
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


@contextmanager
def explain_device_memory(what: str, advice: str) -> Iterator[None]:
    """Replaces torch's error, where the block runs out of device memory, by one that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise OutOfMemoryError(f"{what} did not fit into the memory of the device ({reason}): {advice}.") from error


def logits_rows(vocab_size: int, device: str, least: int = 1) -> int:
    """How many rows of float32 logits one slice of the sampler takes at most; no fewer than `least`."""
    return max(least, LOGITS_BYTES[device] // (vocab_size * 4))


def least_logits_rows(config: TacoConfig) -> int:
    """How many rows of logits must lie in one slice: all those of a step, where logits processors of the engine are."""
    return config.scheduler_config.max_num_seqs if config.model_config.logits_processors else 1


def sampling_bytes(config: TacoConfig, num_rows: int, vocab_size: int, device: str) -> int:
    """What sampling takes at most, a slice of `num_rows` rows of logits included."""
    num_logits = num_rows * vocab_size
    block = BLOCK_ENTRIES_CPU if device == "cpu" else BLOCK_ENTRIES
    whole = num_logits if config.model_config.logits_processors else min(num_logits, block)
    num_scores = min(config.model_config.max_logprobs, vocab_size)
    copies = SORTED_LOGITS_COPIES if num_scores == vocab_size else WHOLE_LOGITS_COPIES
    num_bytes = max(LOGITS_COPIES * num_logits, num_logits + (copies - 1) * whole) * 4
    scheduler = config.scheduler_config
    num_scored = max(min(num_rows, scheduler.max_num_batched_tokens), scheduler.max_num_seqs)
    num_bytes += num_scored * (1 + num_scores) * SCORE_BYTES
    if config.watermark_config is not None:
        block = watermark.BLOCK_ENTRIES_CPU if device == "cpu" else watermark.BLOCK_ENTRIES
        num_bytes = max(num_bytes, num_logits * 4 + min(num_logits, block) * watermark.ENTRY_BYTES)
    return num_bytes


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
        config.model_config.dtype,
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
        source = f"a KV cache of {_size(budget_bytes)}"
    fitting = (count - 1) * cache.block_size
    if count >= needed or (config.model_config.fit_max_model_len and fitting > 0):
        return count
    ways = [f'max_model_len={fitting} or less ("auto" takes what fits)'] if fitting > 0 else []
    if cache.num_gpu_blocks_override is not None:
        ways.append(f"num_gpu_blocks_override={needed} or more")
    else:
        ways.append(f"kv_cache_memory_bytes={needed * shape.block_bytes} or more")
        if config.device_config.device == "cuda":
            ways.append("a higher gpu_memory_utilization")
    raise OutOfMemoryError(
        f"{source} holds {max(0, fitting)} tokens, but one sequence may have max_model_len={max_model_len} "
        f"({_size(needed * shape.block_bytes)}, {shape.block_bytes} bytes for {cache.block_size} tokens). "
        f"Pass {', or '.join(ways)}."
    )


def cpu_step_bytes(config: TacoConfig, model) -> int:  # noqa: ANN001
    """What a step takes on a CPU beside weights and KV cache, at most.

    Args:
        model: a `taco.models.base.CausalLM`.

    Returns:
        Bytes of the activations of `max_num_batched_tokens` tokens, counted as if each linear layer of a decoder layer
        kept its input and its output and attention as much again, and of the logits and the sampler's copies of them.
    """
    layer = max((sum(_linear_widths(layer)) for layer in model.layers), default=0)
    activations = 2 * layer * config.model_config.dtype.itemsize
    num_rows = logits_rows(model.vocab_size, "cpu", least_logits_rows(config))
    sampling = sampling_bytes(config, num_rows, model.vocab_size, "cpu")
    return config.scheduler_config.max_num_batched_tokens * activations + sampling


def _linear_widths(layer) -> Iterator[int]:  # noqa: ANN001
    for module in layer.modules():
        if isinstance(module, MergedLinear):
            yield module.in_features + module.out_features


def cpu_kv_budget(config: TacoConfig, step_bytes: int) -> int:
    """Bytes of the KV cache on a CPU: as stated, else 4 GiB, else half of what is available.

    Args:
        step_bytes: as `cpu_step_bytes`; they have to fit beside the cache, and so has the swap space.

    Raises:
        OutOfMemoryError: the stated size is more than there is.
    """
    stated = config.cache_config.kv_cache_memory_bytes or config.cache_config.cpu_kv_cache_bytes
    swap_bytes = config.cache_config.swap_space_bytes
    available = available_host_bytes() - step_bytes - swap_bytes
    beside, smaller = f"the {_size(step_bytes)} that a step takes", ""
    if swap_bytes:
        beside, smaller = f"{beside} and a swap space of {_size(swap_bytes)}", " or swap_space"
    if available <= 0:
        raise OutOfMemoryError(
            f"There is less memory available than {beside}: pass a smaller max_num_batched_tokens (it is "
            f"{config.scheduler_config.max_num_batched_tokens}){smaller}, or free memory."
        )
    if stated is None:
        return min(DEFAULT_CPU_KV_BYTES, available // 2)
    if stated > available:
        raise OutOfMemoryError(
            f"a KV cache of {_size(stated)} was asked for, but only {_size(available)} of memory are available beside "
            f"{beside}: pass kv_cache_memory_bytes={available} or less; half of that leaves room for other programs."
        )
    return stated


def check_swap_space(config: TacoConfig) -> None:
    """Checks that the host has the memory for the swap space, which for CUDA is taken at once.

    Raises:
        OutOfMemoryError: it has not.
    """
    num_bytes, available = config.cache_config.swap_space_bytes, available_host_bytes()
    if num_bytes > available:
        raise OutOfMemoryError(
            f"a swap space of {_size(num_bytes)} was asked for, but the host has only {_size(available)} of memory "
            f"available: pass swap_space={available / GIB / 2:.2g} or less; with 0, preempted requests are computed "
            "again instead."
        )
