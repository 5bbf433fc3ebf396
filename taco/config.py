"""Frozen configurations: what `EngineArgs.create_config` resolved, read by every layer below it.

They hold plain data. Data types are names ("float32", "bfloat16", "float16") and devices are "cpu" or "cuda", so that
the host side can read them without torch. Nothing here decides anything; `taco.engine.arg_resolution` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from taco.compat import Behaviour
    from taco.logits_processor import LogitsProcessor
    from taco.models.loader.source import ModelSource
    from taco.watermark import WatermarkConfig

QuantizationMethods = Literal["gguf"]
QUANTIZATION_METHODS: list[str] = list(get_args(QuantizationMethods))


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many devices share the work; this version runs on one.

    Args:
        worker_extension_cls: class whose methods the worker gets besides its own, or "module.name" of it.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    worker_extension_cls: str | type | None = None

    @property
    def world_size(self) -> int:
        """Devices that hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, kw_only=True)
class PoolerSettings:
    """How a pooling model makes its results; the caller's `PoolerConfig`, completed from the files of the model.

    Args:
        tasks: pooling tasks that the model can do; the first is the one it is for.
        seq_pooling_type: "CLS", "LAST" or "MEAN", for one vector a text.
        tok_pooling_type: "ALL" or "STEP", for one vector a token.
        use_activation: whether results are normalised or turned into probabilities unless a request says otherwise.
        activation: what makes probabilities of logits: "softmax", "sigmoid" or "identity".
        dimensions: see `taco.pooling_params.PoolingParams`.
        matryoshka_dimensions: allowed `dimensions`: None for none, empty for all up to the size of the embeddings.
        embedding_size: numbers of an embedding; None where folders in `projections` decide it.
        num_logits: numbers that a classifier or a reward model makes of a vector; None for embeddings.
        logit_mean, logit_sigma: logits become (logit - mean) / sigma before the activation.
        step_tag_id, returned_token_ids: see `PoolingParams`.
        projections: folders of the linear layers of sentence-transformers that embeddings pass through, in order.
        prompts: texts to put before others, by their name.
        include_prompt: whether the tokens of such a text are pooled.
        lower_case: whether texts are lowered before they are tokenised.
    """

    tasks: tuple[str, ...]
    seq_pooling_type: str
    tok_pooling_type: str = "ALL"
    use_activation: bool = True
    activation: Literal["softmax", "sigmoid", "identity"] = "softmax"
    dimensions: int | None = None
    matryoshka_dimensions: tuple[int, ...] | None = None
    embedding_size: int | None = None
    num_logits: int | None = None
    logit_mean: float | None = None
    logit_sigma: float | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    projections: tuple[str, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    include_prompt: bool = True
    lower_case: bool = False

    @property
    def task(self) -> str:
        """What the model is for."""
        return self.tasks[0]

    @property
    def pooling_type(self) -> str:
        """The type of the task that the model is for."""
        return self.tok_pooling_type if self.task.startswith("token_") else self.seq_pooling_type


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model, its numbers and its tokenizer.

    Args:
        model: name or path as the caller gave it.
        source: where the weights are on this machine.
        tokenizer: name or path of the tokenizer.
        tokenizer_mode: "auto", "slow" or "mistral".
        hf_token: access token of the model hub, not shown by `repr`.
        dtype_name: data type of weights and activations.
        seed: key of random numbers of requests without a seed of their own.
        max_model_len: most tokens of a sequence, prompt and output together.
        fit_max_model_len: `max_model_len` may be lowered to what the KV cache holds (`max_model_len="auto"`).
        max_logprobs: most log-probabilities a request may ask for at each position.
        logprobs_mode: "raw_logprobs", "processed_logprobs", "raw_logits" or "processed_logits".
        served_model_name: name of the model in logs and in what the commands print.
        hf_config: the Hugging Face config, overrides applied.
        hf_text_config: the part of it that describes the language model (the same object for a text model).
        generation_config: contents of generation_config.json; its `eos_token_id` always applies. Without a
            file, that of the config.
        default_sampling_params: sampling parameters of a caller who gives none.
        vocab_size: rows of the embedding table.
        quantization: None or "gguf".
        chat_template: text of a Jinja template that replaces the tokenizer's.
        hf_overrides: as the caller gave them; already applied to `hf_config`.
        enforce_eager: do not capture CUDA graphs.
        max_seq_len_to_capture: longest sequence that a captured CUDA graph covers.
        use_async_output_proc: plan a step while the previous one runs.
        task: "generate", or for pooling models "embed", "classify", "score" (one class: pairs of texts) or "reward".
        is_encoder: whether tokens also see those after them, so that nothing is cached.
        pooler_config: how a pooling model pools; None for a model that generates.
        logits_processors: classes of the logits processors of the engine, see `taco.logits_processor`.
    """

    model: str
    source: ModelSource
    tokenizer: str
    tokenizer_mode: Literal["auto", "slow", "mistral"] = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    tokenizer_revision: str | None = None
    code_revision: str | None = None
    hf_token: bool | str | None = field(default=None, repr=False)
    dtype_name: str
    seed: int = 0
    max_model_len: int
    fit_max_model_len: bool = False
    max_logprobs: int = 20
    logprobs_mode: str
    served_model_name: str
    hf_config: PretrainedConfig
    hf_text_config: PretrainedConfig
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int
    quantization: QuantizationMethods | None = None
    chat_template: str | None = None
    hf_overrides: Mapping[str, Any] | Callable[[Any], Any] | None = None
    enforce_eager: bool = False
    max_seq_len_to_capture: int = 8192
    use_async_output_proc: bool = True
    task: Literal["generate", "embed", "classify", "score", "reward"] = "generate"
    is_encoder: bool = False
    pooler_config: PoolerSettings | None = None
    logits_processors: tuple[type[LogitsProcessor], ...] = ()

    # What client code asks of any model, and what holds for every model of this version.
    is_multimodal_model: ClassVar[bool] = False
    is_encoder_decoder: ClassVar[bool] = False

    @property
    def runner_type(self) -> str:
        """What its requests end in: "generate" or "pooling"."""
        return "generate" if self.pooler_config is None else "pooling"

    @property
    def supported_runner_types(self) -> frozenset[str]:
        return frozenset({self.runner_type})

    @property
    def is_cross_encoder(self) -> bool:
        """Whether the model scores pairs of texts."""
        return self.task == "score"

    @property
    def dtype(self) -> torch.dtype:
        """Data type of weights and activations, as torch's object."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def get_vocab_size(self) -> int:
        return self.vocab_size

    def get_hidden_size(self) -> int:
        return int(self.hf_text_config.hidden_size)

    def get_head_size(self) -> int:
        """Width of one attention head."""
        head_size = getattr(self.hf_text_config, "head_dim", None)
        return int(head_size or self.get_hidden_size() // self.hf_text_config.num_attention_heads)

    def get_num_attention_heads(self, parallel_config: ParallelConfig | None = None) -> int:
        """Query heads of a layer on one device; of the whole layer without a `parallel_config`."""
        num_devices = parallel_config.tensor_parallel_size if parallel_config else 1
        return int(self.hf_text_config.num_attention_heads) // num_devices

    def get_num_kv_heads(self, parallel_config: ParallelConfig | None = None) -> int:
        """Key/value heads of a layer on one device (at least one); of the whole layer without a `parallel_config`."""
        num_devices = parallel_config.tensor_parallel_size if parallel_config else 1
        num_heads = getattr(self.hf_text_config, "num_key_value_heads", None)
        return max(1, int(num_heads or self.hf_text_config.num_attention_heads) // num_devices)

    def get_num_layers(self, parallel_config: ParallelConfig | None = None) -> int:
        """Decoder layers on one device; of the whole model without a `parallel_config`."""
        num_stages = parallel_config.pipeline_parallel_size if parallel_config else 1
        return int(self.hf_text_config.num_hidden_layers) // num_stages

    def get_diff_sampling_param(self) -> dict[str, Any]:
        """Default sampling parameters that differ from `SamplingParams()`, by its field names."""
        return dict(self.default_sampling_params)

    def try_get_generation_config(self) -> dict[str, Any]:
        """Contents of generation_config.json; empty where there is no such file."""
        return dict(self.generation_config)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The KV cache.

    Args:
        block_size: tokens of a block.
        gpu_memory_utilization: share of the GPU's memory that weights, activations and KV cache may take.
        swap_space_bytes: host memory for the KV cache of preempted requests.
        kv_cache_dtype: data type of the cached keys and values.
        enable_prefix_caching: keep the blocks of finished requests for prompts that begin alike.
        num_gpu_blocks_override: number of blocks, instead of what the memory would hold.
        kv_cache_memory_bytes: size of the KV cache, instead of what `gpu_memory_utilization` leaves.
        cpu_kv_cache_bytes: size of the KV cache on a CPU; None lets the worker choose it.
        num_gpu_blocks: blocks on the device, whatever the device; known after profiling.
        num_cpu_blocks: blocks in `swap_space_bytes`; known after profiling.
    """

    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    swap_space_bytes: int = 0
    kv_cache_dtype: str
    enable_prefix_caching: bool = True
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    cpu_kv_cache_bytes: int | None = None
    num_gpu_blocks: int | None = None
    num_cpu_blocks: int | None = None


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What one step may contain, and in which order requests get it.

    Args:
        max_num_seqs: most sequences that run at once; never more than `max_num_batched_tokens`.
        max_num_batched_tokens: most tokens of a step over all sequences.
        max_model_len: most tokens of a sequence.
        policy: "fcfs" (first come, first served) or "priority" (smaller numbers first).
        enable_chunked_prefill: a prompt may be split over several steps; False schedules it whole.
        preemption_mode: "swap", "recompute", or None: swap while there is room for it.
        async_scheduling: plan a step while the previous one runs.
        long_prefill_token_threshold: most prompt tokens of one sequence in a step; 0 sets no limit.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: Literal["fcfs", "priority"] = "fcfs"
    enable_chunked_prefill: bool = True
    preemption_mode: Literal["swap", "recompute"] | None = None
    async_scheduling: bool = True
    long_prefill_token_threshold: int = 0


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """The device that runs the model."""

    device: Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How weights get from disk to the device.

    Args:
        load_format: "auto", "safetensors", "pt", "gguf" or "dummy" (random weights).
        download_dir: folder for downloads, instead of the hub's cache.
        ignore_patterns: glob patterns of files not to download.
    """

    load_format: str = "auto"
    download_dir: str | None = None
    ignore_patterns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProfilerConfig:
    """What `LLM.start_profile` records, with torch's profiler, and where it writes it.

    Args:
        profiler: "torch".
        torch_profiler_dir: folder of the trace files; it is made where it is missing.
        torch_profiler_with_stack, torch_profiler_with_flops, torch_profiler_record_shapes, torch_profiler_with_memory:
            whether call stacks, numbers of operations, shapes of tensors and use of memory are recorded.
        torch_profiler_use_gzip: whether trace files are compressed.
        delay_iterations: steps that pass before recording starts.
        max_iterations: steps after which recording ends; 0 for no limit.
    """

    profiler: Literal["torch"] = "torch"
    torch_profiler_dir: str
    torch_profiler_with_stack: bool = True
    torch_profiler_with_flops: bool = False
    torch_profiler_use_gzip: bool = True
    torch_profiler_record_shapes: bool = False
    torch_profiler_with_memory: bool = False
    delay_iterations: int = 0
    max_iterations: int = 0


@dataclass(frozen=True, kw_only=True)
class ReasoningConfig:
    """The marks between which a model reasons, for `SamplingParams.thinking_token_budget`.

    Marks are compared as tokens. They are sure to be found where they are tokens of their own in the vocabulary.

    Args:
        reasoning_parser: kind of model, such as "qwen3" or "deepseek_r1", which implies the marks; `taco.reasoning`
            has the list.
        reasoning_start_str: opens a section; empty for the parser's.
        reasoning_end_str: what is written to close a section whose budget is used up; empty for the parser's. It may
            lead to the mark with a phrase: "That is enough.</think>".
    """

    reasoning_parser: str = ""
    reasoning_start_str: str = ""
    reasoning_end_str: str = ""


@dataclass(frozen=True, kw_only=True)
class GuidedDecodingConfig:
    """What holds for guided decoding where a request does not say otherwise.

    Args:
        backend: see `taco.guided.selection`.
        disable_any_whitespace: JSON has no white space between its parts but what is customary.
        disable_additional_properties: JSON objects have no properties beyond those that their schemas name.
        enable_in_reasoning: the text is constrained from its first token on, although the model reasons first.
    """

    backend: str = "auto"
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    enable_in_reasoning: bool = False

    @property
    def guided_decoding_backend(self) -> str:
        """`backend`, by the name of vLLM 0.6."""
        return self.backend


@dataclass(frozen=True, kw_only=True)
class TacoConfig:
    """Everything an engine is built from.

    Args:
        behaviour: the choices in which versions of the reference API differ.
        profiler_config: None where nobody asked for a profiler.
        reasoning_config: marks of reasoning, both set; None where nobody has named them.
        watermark_config: how texts are marked; None marks none.
        log_stats_interval_s: seconds between two lines about the engine in the log; None counts no metrics.
    """

    model_config: ModelConfig
    cache_config: CacheConfig
    scheduler_config: SchedulerConfig
    device_config: DeviceConfig
    load_config: LoadConfig = field(default_factory=LoadConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    behaviour: Behaviour
    profiler_config: ProfilerConfig | None = None
    reasoning_config: ReasoningConfig | None = None
    watermark_config: WatermarkConfig | None = None
    guided_decoding_config: GuidedDecodingConfig = field(default_factory=GuidedDecodingConfig)
    log_stats_interval_s: float | None = None

    @property
    def guided_after_reasoning(self) -> bool:
        """Whether constraints on a text hold for what follows the reasoning."""
        return self.reasoning_config is not None and not self.guided_decoding_config.enable_in_reasoning
