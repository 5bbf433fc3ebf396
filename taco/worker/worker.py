"""The owner of one device: its weights, its KV cache, its model runner."""

from __future__ import annotations

import gc
import logging

import torch

from taco.config import TacoConfig
from taco.envs import limit_onednn_caches
from taco.kernels import native
from taco.models.loader.apply import load_dummy_weights, load_weights
from taco.models.loader.checkpoint import open_checkpoint
from taco.models.registry import resolve_model_class
from taco.plan import StepPlan, StepResult
from taco.worker import memory
from taco.worker.host_memory import return_free_memory
from taco.worker.kv_cache import KVCache, empty_pinned_cache
from taco.worker.model_runner import ModelRunner, PendingStep
from taco.worker.pooler import Pooler, load_projection
from taco.worker.pooling_runner import PoolingRunner
from taco.worker.sampler import Sampler

logger = logging.getLogger(__name__)


class Worker:
    """Everything that lives on one device.

    Call `load_model`, `num_device_blocks`, `start` in this order, then `submit` and `collect` for each step.
    """

    def __init__(self, config: TacoConfig) -> None:
        self.config = config
        self.device = torch.device(config.device_config.device)
        self.runner: ModelRunner | None = None
        if self.device.type == "cpu":
            limit_onednn_caches()
            if reason := native.why_missing():
                logger.warning("The native CPU kernels are not used, which costs much speed: %s.", reason)

    def load_model(self) -> None:
        """Builds the model without memory, checks the checkpoint against it, and loads the weights."""
        config = self.config.model_config
        model_class = resolve_model_class(config.hf_text_config, "classify" if config.task == "score" else config.task)
        with torch.device("meta"):
            model = model_class(config.hf_text_config)
        dtype = config.torch_dtype
        if self.config.load_config.load_format == "dummy":
            load_dummy_weights(model, device=self.device, dtype=dtype, seed=config.seed)
        else:
            checkpoint = open_checkpoint(
                config.source, load_format=self.config.load_config.load_format, hf_config=config.hf_text_config
            )
            try:
                load_weights(
                    model,
                    model.weight_entries(),
                    checkpoint,
                    device=self.device,
                    dtype=dtype,
                    ignore=model.ignored_weights,
                )
            finally:
                checkpoint.close()
        model.finalize(config.max_model_len)
        self.model = model.eval()
        return_free_memory()

    def num_device_blocks(self) -> int:
        """Settles the memory account and returns the number of KV blocks, block 0 included; 0 without a KV cache.

        Raises:
            OutOfMemoryError: with the numbers, and with arguments that would work.
        """
        cache = self.config.cache_config
        shape = memory.geometry(self.config, self.model)
        if shape.block_bytes == 0:
            if self.device.type == "cuda":
                self._profile_cuda()  # a step that is too large fails now, and not in the middle of the work
            return 0
        if cache.num_gpu_blocks_override is not None:
            return memory.num_blocks(self.config, shape, 0)
        if self.device.type == "cpu":
            budget = memory.cpu_kv_budget(self.config, memory.cpu_step_bytes(self.config, self.model))
        else:
            budget = cache.kv_cache_memory_bytes or self._profile_cuda()
        return memory.num_blocks(self.config, shape, budget)

    def num_host_blocks(self) -> int:
        """Blocks that fit the swap space."""
        block_bytes = memory.geometry(self.config, self.model).block_bytes
        return self.config.cache_config.swap_space_bytes // block_bytes if block_bytes else 0

    def max_idle_cached_blocks(self) -> int | None:
        """How many idle blocks of cached prefixes may make the process grow; None where all memory is taken anyway."""
        block_bytes = memory.geometry(self.config, self.model).block_bytes
        if self.device.type != "cpu" or block_bytes == 0:
            return None
        return memory.CPU_IDLE_PREFIX_BYTES // block_bytes

    @torch.inference_mode()
    def _profile_cuda(self) -> int:
        """Bytes that `gpu_memory_utilization` leaves for the KV cache, found by running the largest step."""
        from taco.worker.profile import worst_case_bytes

        free, total = torch.cuda.mem_get_info(self.device)
        allowed = int(total * self.config.cache_config.gpu_memory_utilization)
        held = torch.cuda.memory_allocated(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device)  # other processes, the CUDA context
        return max(0, allowed - others - held - worst_case_bytes(self.config, self.model, self.device))

    def start(self, num_device_blocks: int, num_host_blocks: int) -> None:
        """Makes the KV cache and the runner; from here on no transient exceeds the account."""
        config = self.config
        model = self.model
        vocab_size = model.vocab_size
        advice = (
            "pass a smaller gpu_memory_utilization, kv_cache_memory_bytes or num_gpu_blocks_override, or free memory "
            "that other processes hold"
        )
        with memory.explain_device_memory(f"a KV cache of {num_device_blocks} blocks", advice):
            kv_cache = KVCache(
                num_layers=model.num_layers,
                num_blocks=num_device_blocks,
                num_host_blocks=num_host_blocks,
                num_kv_heads=model.num_kv_heads,
                block_size=config.cache_config.block_size,
                head_dim=model.head_dim,
                dtype=config.model_config.torch_dtype,
                device=self.device,
            )
        runner_class, head = self._make_head()
        self.runner = runner_class(
            model=model,
            kv_cache=kv_cache,
            sampler=head,
            device=self.device,
            max_num_rows=config.scheduler_config.max_num_seqs,
            max_model_len=config.scheduler_config.max_model_len,
            block_size=config.cache_config.block_size,
            logits_rows=memory.logits_rows(vocab_size, self.device.type),
        )

    def _make_head(self) -> tuple[type[ModelRunner], Sampler | Pooler]:
        """What the steps of the model end in, and the kind of runner that they need."""
        config = self.config
        model = config.model_config
        if model.pooler_config is None:
            return ModelRunner, Sampler(
                vocab_size=self.model.vocab_size,
                max_num_rows=config.scheduler_config.max_num_seqs,
                device=self.device,
                logprobs_mode=model.logprobs_mode,
                rank_counts_ties=config.behaviour.rank_counts_ties,
                processes_prompt=config.behaviour.logprobs_after_processing,
            )
        return PoolingRunner, Pooler(
            model.pooler_config,
            self.model.compute_logits,
            model.torch_dtype,
            [load_projection(folder, self.device) for folder in model.pooler_config.projections],
            memory.logits_rows(self.model.num_logits, self.device.type),
        )

    def submit(self, plan: StepPlan) -> PendingStep:
        assert self.runner is not None
        return self.runner.submit(plan)

    def collect(self, pending: PendingStep) -> StepResult:
        assert self.runner is not None
        return self.runner.collect(pending)

    def reset(self) -> None:
        """Forgets every row and step, after a step has failed."""
        assert self.runner is not None
        self.runner.reset()

    def shutdown(self) -> None:
        """Gives all memory back."""
        self.runner = None
        del self.model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            empty_pinned_cache()
        return_free_memory()
