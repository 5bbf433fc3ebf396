"""The owner of one device: its weights, its KV cache, its model runner."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from taco.config import TacoConfig
from taco.envs import limit_onednn_caches
from taco.errors import EngineAsleepError, EngineError, TacoError, TacoValidationError
from taco.kernels import native
from taco.models.loader.apply import load_dummy_weights, load_weights
from taco.models.loader.opening import open_checkpoint
from taco.models.loader.update import Placement, Weights, drop_weights
from taco.models.registry import resolve_model_class
from taco.plan import StepPlan, StepResult
from taco.worker import memory
from taco.worker.host_memory import return_free_memory
from taco.worker.kv_cache import KVCache, empty_pinned_cache
from taco.worker.model_runner import ModelRunner, PendingStep
from taco.worker.pooler import Pooler, load_projection
from taco.worker.pooling_runner import PoolingRunner
from taco.worker.sampler import Sampler
from taco.worker.torch_profiler import TorchProfiler

if TYPE_CHECKING:
    from taco.guided.compiler import GrammarCompiler
    from taco.models.base import Model

logger = logging.getLogger(__name__)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Says of an error of Python in this context that the configuration of the model has something to do with it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, TacoError):
            raise
        raise TacoValidationError(
            f"No model can be made of the configuration of {name} ({type(error).__name__}: {error}); check its "
            "config.json.",
            parameter="model",
            value=name,
        ) from error


class Worker:
    """Everything that lives on one device.

    Call `load_model`, `num_device_blocks`, `start` in this order, then `submit` and `collect` for each step.

    Attributes:
        model: the model that it runs.
        asleep: which memory has been given back and not taken again: "weights", "kv_cache".
        rank, local_rank: its number among the workers.
    """

    rank = local_rank = 0

    def __init__(self, config: TacoConfig, grammars: GrammarCompiler) -> None:
        self.config = config
        self.grammars = grammars
        self.device = torch.device(config.device_config.device)
        if self.device.type == "cuda":  # threads have a current device of their own
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.runner: ModelRunner | None = None
        self.asleep: set[str] = set()
        self._num_cache_losses = 0
        self._profiler = None if config.profiler_config is None else TorchProfiler(config.profiler_config, self.device)
        if self.device.type == "cpu":
            limit_onednn_caches()
            if reason := native.why_missing():
                logger.warning("The native CPU kernels are not used, which costs much speed: %s.", reason)

    def load_model(self) -> None:
        """Builds the model without memory, checks the checkpoint against it, and loads the weights."""
        config = self.config.model_config
        model_class = resolve_model_class(config.hf_text_config, "classify" if config.task == "score" else config.task)
        with torch.device("meta"), _explained(config.model):
            model = model_class(config.hf_text_config)
        model.placement = Placement(config.hf_text_config, self.device, config.dtype, config.max_model_len)
        self.model = model.eval()
        self._load_weights()

    def _load_weights(self) -> None:
        """Fills the model, which has no weights, and finalises it."""
        config, model = self.config.model_config, self.model
        dtype = config.dtype
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
        with _explained(config.model):
            model.finalize(model.placement.max_model_len)
        model.missing_weights = frozenset()
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
        """Blocks that fit the swap space.

        Raises:
            OutOfMemoryError: the host has not so much memory.
        """
        block_bytes = memory.geometry(self.config, self.model).block_bytes
        if block_bytes == 0:
            return 0
        memory.check_swap_space(self.config)
        return self.config.cache_config.swap_space_bytes // block_bytes

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

        step_bytes = worst_case_bytes(self.config, self.model, self.device)  # first: libraries take memory when used
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = int(total * self.config.cache_config.gpu_memory_utilization)
        held = torch.cuda.memory_allocated(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device)  # other processes, the CUDA context
        return max(0, allowed - others - held - step_bytes)

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
                dtype=config.model_config.dtype,
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
            logits_rows=memory.logits_rows(vocab_size, self.device.type, memory.least_logits_rows(config)),
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
                watermark_config=config.watermark_config,
                grammars=self.grammars,
                guided_after_reasoning=config.guided_after_reasoning,
                logits_processors=[
                    processor(config, self.device, self.device.type == "cuda") for processor in model.logits_processors
                ],
            )
        return PoolingRunner, Pooler(
            model.pooler_config,
            self.model.compute_logits,
            model.dtype,
            [load_projection(folder, self.device) for folder in model.pooler_config.projections],
            memory.logits_rows(self.model.num_logits, self.device.type),
        )

    def submit(self, plan: StepPlan) -> PendingStep:
        assert self.runner is not None
        with nullcontext() if self.device.index is None else torch.cuda.device(self.device):
            pending = self.runner.submit(plan)
        if self._profiler is not None:
            self._profiler.step()
        return pending

    def collect(self, pending: PendingStep) -> StepResult:
        assert self.runner is not None
        return self.runner.collect(pending)

    def reset(self) -> None:
        """Forgets every row and step, after a step has failed; raises if the device works no more."""
        assert self.runner is not None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.runner.reset()

    # What programs reach into, by these names

    @property
    def model_runner(self) -> ModelRunner | None:
        """Its `model` has `load_weights`."""
        return self.runner

    def get_model(self) -> Model:
        return self.model

    # Weights

    def load_weights(self, weights: Weights) -> set[str]:
        """See `Model.load_weights`.

        Raises:
            EngineAsleepError: the weights are asleep.
        """
        self._check_weights_awake()
        names = self.model.load_weights(weights)
        return_free_memory()
        return names

    def reload_weights(self) -> None:
        """Loads the weights of the checkpoint again, in place of those that are there.

        Raises:
            EngineAsleepError: the weights are asleep.
        """
        self._check_weights_awake()
        drop_weights(self.model)
        self._load_weights()

    def compute_weight_checksums(self) -> dict[str, str]:
        """SHA-256 digests of the parameters as they lie in memory (packed by oneDNN: as they were before), by name."""
        self._check_weights_awake()
        digests = {}
        for name, parameter in self.model.named_parameters():
            tensor = parameter.detach()
            tensor = tensor.to_dense() if tensor.is_mkldnn else tensor.cpu().contiguous()
            digests[name] = hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()
        return digests

    def _check_weights_awake(self) -> None:
        if "weights" in self.asleep:
            raise EngineAsleepError('The weights are asleep; call wake_up(tags=["weights"]) first.')

    # Sleeping

    @property
    def cache_epoch(self) -> int:
        """Another number whenever what the KV cache held is not valid any more."""
        return self._num_cache_losses + self.model.num_weight_updates

    def sleep(self, level: int = 1) -> None:
        """Gives memory back: that of the KV cache and of weights.

        Args:
            level: 1: weights on a GPU move to host memory; those on a CPU stay, as there is nowhere else to keep them.
                2: all weights are dropped.
        """
        if level not in (1, 2):
            raise TacoValidationError(f"level must be 1 or 2, got {level!r}.", parameter="level", value=level)
        self.free_kv_cache()
        if level == 2:
            drop_weights(self.model)
            self.asleep.add("weights")
        elif self.device.type != "cpu" and "weights" not in self.asleep:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to("cpu")
            self.asleep.add("weights")
        self._return_memory()

    def free_kv_cache(self) -> None:
        """Gives the memory of the KV cache back."""
        assert self.runner is not None
        self.runner.kv_cache.free()
        self.runner.workspace.free()
        self._num_cache_losses += 1
        self.asleep.add("kv_cache")
        self._return_memory()

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Takes memory again: "weights", "kv_cache", or both for None. Weights that were dropped are still missing."""
        tags = ("weights", "kv_cache") if tags is None else tags
        if unknown := set(tags) - {"weights", "kv_cache"}:
            raise TacoValidationError(
                f'tags can be "weights" and "kv_cache", got {sorted(unknown)}.', parameter="tags", value=tags
            )
        assert self.runner is not None
        advice = "free memory of the device first; the engine stays asleep until then"
        for tag in [tag for tag in ("weights", "kv_cache") if tag in tags and tag in self.asleep]:
            with memory.explain_device_memory(f"{tag} of an engine that wakes up", advice):
                if tag == "weights":
                    for parameter in self.model.parameters():
                        if not parameter.is_meta:
                            parameter.data = parameter.data.to(self.device)
                else:
                    try:
                        self.runner.kv_cache.allocate()
                    except BaseException:
                        self.runner.kv_cache.free()
                        raise
            self.asleep.remove(tag)

    def _return_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            empty_pinned_cache()
        return_free_memory()

    # Profiling

    def start_profile(
        self,
        profile_prefix: str | None = None,
        *,
        delay_iterations: int | None = None,
        max_iterations: int | None = None,
        profiler_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """See `TorchProfiler.start`.

        Raises:
            EngineError: nobody said where the trace files go.
        """
        self._get_profiler().start(profile_prefix, delay_iterations, max_iterations, profiler_kwargs)

    def stop_profile(self) -> None:
        """See `TorchProfiler.stop`."""
        self._get_profiler().stop()

    def _get_profiler(self) -> TorchProfiler:
        if self._profiler is None:
            raise EngineError(
                "Profiler is not enabled. Say where the trace files go when the engine is made: pass "
                'profiler_config={"torch_profiler_dir": FOLDER}, or set the environment variable '
                "VLLM_TORCH_PROFILER_DIR."
            )
        return self._profiler

    def shutdown(self) -> None:
        """Gives all memory back."""
        self.runner = None
        self.__dict__.pop("model", None)  # there is none if loading it has failed
        try:
            self._return_memory()
        except Exception as error:  # what has broken the device has been reported by then
            logger.warning("Memory of %s could not be given back: %s", self.device, error)
