"""`EngineArgs`: the flat keyword arguments of an engine, and how they become frozen configs.

The fields of `EngineArgs` are one table. They have the names of vLLM 0.6.6 in its order, then the names that vLLM 0.33
added, then taco's own. Every field has one of three treatments:

- `implemented`: it does what its help text says; its rule states the values it takes. Each of these has a CLI flag.
- `immaterial`: accepted, because no value of it can change a result here or make a request possible; the text says why.
- `not_built`: the feature behind it is missing; any value but the neutral ones raises `UnsupportedFeatureError`.

To build a feature, change the treatment of its field and resolve the value in `EngineArgs.create_config`.

This module imports neither torch nor transformers; `create_config` does, when it is called.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from taco import envs
from taco.compat import behaviour_for
from taco.config import (
    QUANTIZATION_METHODS,
    CacheConfig,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    TacoConfig,
)
from taco.engine.arg_fields import (
    ClassName,
    DType,
    ExecutorRule,
    Implemented,
    Integer,
    JsonObject,
    LogitsProcessorsRule,
    Number,
    OneOf,
    PoolerRule,
    ProfilerRule,
    ReasoningParser,
    ReasoningRule,
    Rule,
    StructuredOutputsRule,
    Switch,
    TextList,
    Token,
    Treatment,
    WatermarkRule,
    immaterial,
    implemented,
    not_built,
    treatment_of,
)
from taco.engine.arg_resolution import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_NUM_BATCHED_TOKENS,
    DEFAULT_NUM_SEQS,
    FIT_MAX_MODEL_LEN,
    Problems,
    check_combinations,
    check_generation_overrides,
    check_quantization,
    check_rope,
    checkpoint_dtype,
    first_given,
    for_encoder,
    profiler_from_environment,
    read_generation_config,
    resolve_batch_limits,
    resolve_cpu_kv_cache_bytes,
    resolve_default_sampling_params,
    resolve_device,
    resolve_dtype,
    resolve_guided_decoding,
    resolve_max_model_len,
    resolve_swap_space_bytes,
)
from taco.engine.pooling_config import Task, resolve_pooler, resolve_task, scores_by_tokens
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.guided.request import BACKENDS, StructuredOutputsConfig
from taco.pooling_params import PoolerConfig
from taco.reasoning import complete_reasoning_config
from taco.tokenizer.chat_template import read_chat_template
from taco.usage_context import UsageContext
from taco.watermark import WatermarkConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from typing_extensions import Self

    from taco.models.loader.source import ModelSource

logger = logging.getLogger(__name__)

ONE_DEVICE = "it concerns several devices or processes, and the engine is one process on one device"
ONE_TOKENIZER = "prompts are tokenised in the process of the engine"
EAGER = "it shapes compilation or CUDA graphs; every step runs eagerly, with the same results"
PLANNED_STEPS = "every step is planned anew while the previous one runs"
LOADER = "it tunes how files are read; the weights are the same"
NO_MEDIA = "it concerns images, audio and video, which no supported model reads"
NO_EXPERTS = "no supported model has experts"
NO_STATE_SPACE = "no supported model has state-space or linear-attention layers"
NO_LORA = "it is read only together with enable_lora"
NO_PROMPT_ADAPTER = "it is read only together with enable_prompt_adapter"
NO_SPECULATION = "it is read only together with speculative_model"
NO_OFFLOAD = "it is read only where weights are offloaded"
SLEEPS = "`LLM.sleep` always works, and needs no allocator of its own"
NO_CONTEXT_PARALLEL = "it is read only together with decode_context_parallel_size"
NO_LOOKAHEAD = "it is read only together with lookahead_cache_config_dir"

TEXT = Rule()
OPTIONAL_TEXT = Rule(optional=True)
SWITCH = Switch()
OPTIONAL_SWITCH = Switch(optional=True)


@dataclass
class EngineArgs:
    """Arguments of an engine; `create_config` checks and resolves them. The table below is their documentation.

    Values are not checked on construction, so that an instance can be changed until it is used. `vars()` of an instance
    is a valid keyword set for `LLM`.
    """

    # Names of vLLM 0.6.6, in its order.
    model: str = implemented("facebook/opt-125m", TEXT, "Folder, .gguf file or hub id of the model.")
    served_model_name: str | list[str] | None = implemented(
        None,
        TextList(optional=True),
        "Name of the model in logs and in what the commands print, instead of `model`; the first counts.",
    )
    tokenizer: str | None = implemented(None, OPTIONAL_TEXT, "Folder or hub id of the tokenizer, if not the model's.")
    task: str = implemented(
        "auto",
        OneOf(values=("auto", "generate", "embed", "embedding", "classify", "score", "reward")),
        'What the model is used for: "auto" is what it is made for.',
    )
    skip_tokenizer_init: bool = implemented(
        False, SWITCH, "Load no tokenizer: prompts must be token ids, and outputs have no text."
    )
    tokenizer_mode: str = implemented(
        "auto",
        OneOf(values=("auto", "slow", "mistral")),
        'Kind of tokenizer: "auto" takes the fast one where there is one, "slow" the one in Python (rare), "mistral" '
        "that of mistral-common, from tekken.json or tokenizer.model.vN.",
    )
    trust_remote_code: bool = implemented(
        False,
        SWITCH,
        "Run Python code that comes with the model for its configuration and its tokenizer. The model itself is "
        "computed by taco.",
    )
    allowed_local_media_path: str = immaterial("", NO_MEDIA)
    download_dir: str | None = implemented(None, OPTIONAL_TEXT, "Folder for downloads, instead of the hub's cache.")
    load_format: str = implemented(
        "auto",
        OneOf(values=("auto", "safetensors", "pt", "gguf", "dummy")),
        'Format of the weights: "auto" takes what it finds, "dummy" makes random ones.',
    )
    config_format: str = implemented("auto", OneOf(values=("auto", "hf")), "Format of the model's config.")
    dtype: Any = implemented(
        "auto", DType(), 'Data type of weights and activations: "auto" follows the checkpoint and the device.'
    )
    kv_cache_dtype: str = implemented(
        "auto", OneOf(values=("auto",)), 'Data type of the KV cache: "auto" is that of the model.'
    )
    quantization_param_path: str | None = not_built(None, "a KV cache with scaling factors")
    seed: int | None = implemented(
        0,
        Integer(optional=True, minimum=-(2**63), maximum=2**64 - 1),
        "Key of the random numbers of requests without a seed. None is 0.",
    )
    max_model_len: int | str | None = implemented(
        None,
        Integer(minimum=1, optional=True, scaled=True, words=(("auto", FIT_MAX_MODEL_LEN),)),
        "Most tokens of a sequence, prompt and output together. Unset: what the model was made for; "
        '"auto" or -1: the same, or less where the KV cache holds less.',
    )
    worker_use_ray: bool = not_built(False, "running on Ray")
    distributed_executor_backend: Any = implemented(
        None,
        ExecutorRule(optional=True),
        'Who runs the workers: "uni", "mp" or "external_launcher". There is one, which runs in this process, whatever '
        "is given; a launcher must have started one process.",
    )
    pipeline_parallel_size: int = implemented(
        1, OneOf(values=(1,)), "Devices that share the layers of the model, one after the other; only 1 is supported."
    )
    tensor_parallel_size: int = implemented(
        1, OneOf(values=(1,)), "Devices that share the work of every layer; only 1 is supported."
    )
    max_parallel_loading_workers: int | None = immaterial(None, ONE_DEVICE)
    block_size: int | None = implemented(
        None, OneOf(optional=True, values=(8, 16, 32, 64, 128)), "Tokens of a block of the KV cache. Unset: 16."
    )
    enable_prefix_caching: bool | None = implemented(
        None, OPTIONAL_SWITCH, "Keep the KV cache of finished requests for prompts that begin alike. Unset: yes."
    )
    disable_sliding_window: bool = implemented(
        False, SWITCH, "Use full attention, with sequences no longer than the sliding window of the model."
    )
    use_v2_block_manager: bool = immaterial(True, "there is one block manager", obsolete=True)
    swap_space: float | None = implemented(
        None,
        Number(optional=True),
        "Host memory in GiB that takes the KV cache of preempted requests; 0 recomputes them instead. Unset: 4 on a "
        "GPU; 0 on a CPU, where it would be more of the memory that has run out, unless preemption_mode is swap.",
    )
    cpu_offload_gb: float = not_built(0, "offloading weights to host memory")
    gpu_memory_utilization: float = implemented(
        0.9,
        Number(maximum=1.0, exclude_minimum=True),
        "Share of the GPU's memory for weights, activations and KV cache; no effect on a CPU.",
    )
    max_num_batched_tokens: int | None = implemented(
        None,
        Integer(minimum=1, optional=True, scaled=True),
        "Most tokens of a step over all sequences. Unset: 2048 on a CPU, 8192 on a GPU, "
        "and at least max_num_seqs (at least max_model_len without chunked prefill).",
    )
    max_num_seqs: int | None = implemented(
        None, Integer(minimum=1, optional=True), "Most sequences that run at once. Unset: 256."
    )
    max_logprobs: int = implemented(
        20, Integer(minimum=-1), "Most log-probabilities a request may ask for at each position; -1: the vocabulary."
    )
    disable_log_stats: bool = implemented(
        False,
        SWITCH,
        "Do not count the metrics of the engine, which `LLM.get_metrics` returns and a line in the log sums up every "
        "10 s. `LLM` does not count them unless this is False; outputs have their own metrics in any case.",
    )
    revision: str | None = implemented(None, OPTIONAL_TEXT, "Branch, tag or commit of the model on the hub.")
    code_revision: str | None = implemented(
        None,
        OPTIONAL_TEXT,
        "Branch, tag or commit of the model's code on the hub, if it is in a repository of its own.",
    )
    rope_scaling: dict[str, Any] | None = implemented(
        None, JsonObject(optional=True), "Scaling of rotary embeddings, instead of the model's, with its `rope_type`."
    )
    rope_theta: float | None = implemented(
        None, Number(optional=True, exclude_minimum=True), "Base of rotary embeddings, instead of the model's."
    )
    hf_overrides: Any = implemented(
        None,
        JsonObject(optional=True, or_callable=True),
        "Values that replace those of the model's config, or a callable from config to config.",
    )
    tokenizer_revision: str | None = implemented(
        None, OPTIONAL_TEXT, "Branch, tag or commit of the tokenizer on the hub. Unset: `revision`."
    )
    quantization: str | None = implemented(
        None,
        OneOf(optional=True, values=tuple(QUANTIZATION_METHODS)),
        'How the weights are quantised: "gguf" for a .gguf file.',
    )
    enforce_eager: bool | None = implemented(
        None, OPTIONAL_SWITCH, "Do not capture CUDA graphs. None are captured yet, so every step runs eagerly anyway."
    )
    max_seq_len_to_capture: int = implemented(
        8192, Integer(minimum=1), "Longest sequence for which CUDA graphs are used, once they are captured."
    )
    disable_custom_all_reduce: bool = immaterial(False, ONE_DEVICE)
    tokenizer_pool_size: int = immaterial(0, ONE_TOKENIZER, obsolete=True)
    tokenizer_pool_type: Any = immaterial("ray", ONE_TOKENIZER, obsolete=True)
    tokenizer_pool_extra_config: dict[str, Any] | None = immaterial(None, ONE_TOKENIZER, obsolete=True)
    limit_mm_per_prompt: Mapping[str, Any] | None = not_built(None, "multimodal input")
    mm_processor_kwargs: dict[str, Any] | None = not_built(None, "multimodal input")
    disable_mm_preprocessor_cache: bool = immaterial(False, NO_MEDIA)
    enable_lora: bool = not_built(False, "LoRA")
    enable_lora_bias: bool = immaterial(False, NO_LORA)
    max_loras: int = immaterial(1, NO_LORA)
    max_lora_rank: int = immaterial(16, NO_LORA)
    enable_prompt_adapter: bool = not_built(False, "prompt adapters")
    max_prompt_adapters: int = immaterial(1, NO_PROMPT_ADAPTER)
    max_prompt_adapter_token: int = immaterial(0, NO_PROMPT_ADAPTER)
    fully_sharded_loras: bool = immaterial(False, NO_LORA)
    lora_extra_vocab_size: int = immaterial(256, NO_LORA)
    long_lora_scaling_factors: tuple[float, ...] | None = immaterial(None, NO_LORA)
    lora_dtype: Any = immaterial("auto", NO_LORA)
    max_cpu_loras: int | None = immaterial(None, NO_LORA)
    device: str = implemented(
        "auto", OneOf(values=("auto", "cpu", "cuda")), 'Where the model runs: "auto" takes a GPU where there is one.'
    )
    num_scheduler_steps: int = immaterial(1, PLANNED_STEPS, obsolete=True)
    multi_step_stream_outputs: bool = immaterial(True, PLANNED_STEPS, obsolete=True)
    ray_workers_use_nsight: bool = not_built(False, "running on Ray")
    num_gpu_blocks_override: int | None = implemented(
        None, Integer(minimum=1, optional=True), "Number of blocks of the KV cache, instead of what the memory holds."
    )
    num_lookahead_slots: int = immaterial(0, NO_SPECULATION, obsolete=True)
    model_loader_extra_config: dict[str, Any] | None = not_built(None, "options of a weight loader")
    ignore_patterns: str | list[str] | None = implemented(
        None, TextList(optional=True), "Glob patterns of files of the model that are not downloaded."
    )
    preemption_mode: str | None = implemented(
        None,
        OneOf(optional=True, values=("swap", "recompute")),
        "What becomes of the KV cache of a preempted request. Unset: swapped while there is room, else recomputed.",
    )
    scheduler_delay_factor: float = immaterial(
        0.0, "prompts and running requests share every step, so that delaying prompts gains nothing", obsolete=True
    )
    enable_chunked_prefill: bool | None = implemented(
        None, OPTIONAL_SWITCH, "Split prompts over several steps. Unset: yes; no: every prompt in one step."
    )
    guided_decoding_backend: str = implemented(
        "auto",
        OneOf(values=tuple(BACKENDS)),
        'Library for guided decoding where a request names none; "auto" is the first that enforces all that is asked '
        "for. What the named one cannot enforce is left to another.",
    )
    logits_processor_pattern: str | None = not_built(None, "logits processors by name")
    speculative_model: str | None = not_built(None, "speculative decoding")
    speculative_model_quantization: str | None = immaterial(None, NO_SPECULATION)
    speculative_draft_tensor_parallel_size: int | None = immaterial(None, NO_SPECULATION)
    num_speculative_tokens: int | None = immaterial(None, NO_SPECULATION)
    speculative_disable_mqa_scorer: bool | None = immaterial(False, NO_SPECULATION)
    speculative_max_model_len: int | None = immaterial(None, NO_SPECULATION)
    speculative_disable_by_batch_size: int | None = immaterial(None, NO_SPECULATION)
    ngram_prompt_lookup_max: int | None = immaterial(None, NO_SPECULATION)
    ngram_prompt_lookup_min: int | None = immaterial(None, NO_SPECULATION)
    spec_decoding_acceptance_method: str = immaterial("rejection_sampler", NO_SPECULATION)
    typical_acceptance_sampler_posterior_threshold: float | None = immaterial(None, NO_SPECULATION)
    typical_acceptance_sampler_posterior_alpha: float | None = immaterial(None, NO_SPECULATION)
    qlora_adapter_name_or_path: str | None = not_built(None, "QLoRA")
    disable_logprobs_during_spec_decoding: bool | None = immaterial(None, NO_SPECULATION)
    otlp_traces_endpoint: str | None = not_built(None, "OpenTelemetry tracing")
    collect_detailed_traces: Any = not_built(None, "OpenTelemetry tracing")
    disable_async_output_proc: bool = implemented(
        False, SWITCH, "Plan each step only after the previous one has ended, instead of while it runs."
    )
    scheduling_policy: str = implemented(
        "fcfs",
        OneOf(values=("fcfs", "priority")),
        'Order of requests: "fcfs", first come, first served; "priority", smallest priority number first.',
    )
    override_neuron_config: dict[str, Any] | None = not_built(None, "running on AWS Neuron")
    override_pooler_config: Any = implemented(
        None, PoolerRule(optional=True), "Old name of pooler_config; give one of them."
    )
    compilation_config: Any = immaterial(None, EAGER)
    worker_cls: str = not_built("auto", "another worker class")
    kv_transfer_config: Any = not_built(None, "sending the KV cache to other engines")
    generation_config: str | None = implemented(
        None,
        OPTIONAL_TEXT,
        'Where default sampling parameters come from: "auto", generation_config.json of the model; "vllm", neutral '
        "values; else a folder that has such a file. Unset: as compat_version says.",
    )

    # Names that vLLM 0.33 added, in its order.
    enable_return_routed_experts: bool = not_built(False, "returning the experts of a token")
    return_sampling_mask: bool = not_built(False, "returning the sampling mask")
    model_weights: str = not_built("", "weights from another place than `model`")
    hf_config_path: str | None = not_built(None, "a config from another place than `model`")
    runner: str = implemented(
        "auto",
        OneOf(values=("auto", "generate", "pooling")),
        'Whether the model generates or pools hidden states: "auto" is what it is made for. See `task`.',
    )
    convert: str = implemented(
        "auto",
        OneOf(values=("auto", "none", "embed", "classify")),
        'What a model is used for that was made for something else; "none" and "auto" leave it to runner and task.',
    )
    enable_prompt_embeds: bool = not_built(False, "prompts of embeddings")
    allowed_media_domains: list[str] | None = immaterial(None, NO_MEDIA)
    safetensors_load_strategy: str | None = immaterial(None, LOADER)
    safetensors_prefetch_num_threads: int | None = immaterial(None, LOADER)
    safetensors_prefetch_block_size: int | None = immaterial(None, LOADER)
    cudagraph_capture_sizes: list[int] | None = immaterial(None, EAGER)
    max_cudagraph_capture_size: int | None = immaterial(None, EAGER)
    ir_op_priority: Any = not_built(None, "the choice of kernels")
    master_addr: str = immaterial("127.0.0.1", ONE_DEVICE)
    master_port: int = immaterial(29501, ONE_DEVICE)
    nnodes: int = not_built(1, "running on several machines")
    node_rank: int = not_built(0, "running on several machines")
    distributed_timeout_seconds: int | None = immaterial(None, ONE_DEVICE)
    cpu_distributed_timeout_seconds: int | None = immaterial(None, ONE_DEVICE)
    numa_bind: bool = not_built(False, "binding to NUMA nodes")
    numa_bind_nodes: list[int] | None = not_built(None, "binding to NUMA nodes")
    numa_bind_cpus: list[str] | None = not_built(None, "binding to NUMA nodes")
    device_ids: list[int | str] | None = not_built(None, "the choice of devices other than by CUDA_VISIBLE_DEVICES")
    prefill_context_parallel_size: int = not_built(1, "context parallelism")
    decode_context_parallel_size: int = not_built(1, "context parallelism")
    dcp_comm_backend: str | None = immaterial(None, NO_CONTEXT_PARALLEL)
    dcp_q_replicate: bool | None = immaterial(None, NO_CONTEXT_PARALLEL)
    dcp_kv_cache_interleave_size: int = immaterial(1, NO_CONTEXT_PARALLEL)
    cp_kv_cache_interleave_size: int | None = immaterial(None, NO_CONTEXT_PARALLEL)
    data_parallel_size: int = implemented(
        1, OneOf(values=(1,)), "Copies of the model that share the requests; only 1 is supported."
    )
    data_parallel_rank: int | None = not_built(None, "data parallelism", also=(0,))
    data_parallel_start_rank: int | None = not_built(None, "data parallelism", also=(0,))
    data_parallel_size_local: int | None = not_built(None, "data parallelism", also=(1,))
    data_parallel_address: str | None = immaterial(None, ONE_DEVICE)
    data_parallel_rpc_port: int | None = immaterial(None, ONE_DEVICE)
    data_parallel_hybrid_lb: bool = not_built(False, "data parallelism")
    data_parallel_external_lb: bool = not_built(False, "data parallelism")
    data_parallel_multi_port_external_lb: bool = not_built(False, "data parallelism")
    data_parallel_backend: str = immaterial("mp", ONE_DEVICE)
    enable_hc_sp: bool = not_built(False, "sequence parallelism")
    enable_expert_parallel: bool = immaterial(False, NO_EXPERTS)
    enable_batch_sharded_sampling: bool | None = immaterial(None, ONE_DEVICE)
    enable_ep_weight_filter: bool = immaterial(False, NO_EXPERTS)
    moe_backend: str = immaterial("auto", NO_EXPERTS)
    linear_backend: str = not_built("auto", "the choice of kernels")
    sparse_indexer_topk_backend: str = not_built("auto", "the choice of kernels")
    all2all_backend: str = immaterial("allgather_reducescatter", NO_EXPERTS)
    enable_elastic_ep: bool = immaterial(False, NO_EXPERTS)
    elastic_ep_max_dp_size: int | None = immaterial(None, NO_EXPERTS)
    enable_dbo: bool = immaterial(False, ONE_DEVICE)
    ubatch_size: int = immaterial(0, ONE_DEVICE)
    dbo_decode_token_threshold: int = immaterial(32, ONE_DEVICE)
    dp_sync_interval: int = immaterial(16, ONE_DEVICE)
    dbo_prefill_token_threshold: int = immaterial(512, ONE_DEVICE)
    disable_nccl_for_dp_synchronization: bool | None = immaterial(None, ONE_DEVICE)
    eplb_config: Any = immaterial(None, NO_EXPERTS)
    enable_eplb: bool = immaterial(False, NO_EXPERTS)
    expert_placement_strategy: str = immaterial("linear", NO_EXPERTS)
    _api_process_count: int = not_built(1, "several API processes")
    _api_process_rank: int = not_built(0, "several API processes")
    prefix_caching_hash_algo: str = immaterial("sha256", "the keys of the prefix cache never leave the process")
    prefix_cache_retention_interval: int | None = not_built(0, "keeping prefix cache entries for a time", also=(None,))
    disable_cascade_attn: bool | None = immaterial(
        None, "prefixes that are read once for several rows change no bit of their results"
    )
    offload_backend: str = immaterial("auto", NO_OFFLOAD)
    cpu_offload_params: Any = immaterial(None, NO_OFFLOAD)
    offload_group_size: int = not_built(0, "offloading weights to host memory")
    offload_num_in_group: int = immaterial(1, NO_OFFLOAD)
    offload_prefetch_step: int = immaterial(1, NO_OFFLOAD)
    offload_params: Any = immaterial(None, NO_OFFLOAD)
    kv_cache_memory_bytes: int | None = implemented(
        None,
        Integer(minimum=1, optional=True, scaled=True),
        "Size of the KV cache in bytes, instead of what gpu_memory_utilization or VLLM_CPU_KVCACHE_SPACE say.",
    )
    max_num_scheduled_tokens: int | None = not_built(None, "a limit of scheduled tokens besides max_num_batched_tokens")
    long_prefill_token_threshold: int = implemented(
        0, Integer(), "Most prompt tokens of one sequence in a step, so that others advance too; 0: no limit."
    )
    long_prefill_token_threshold_adaptive: bool = not_built(False, "a limit of prompt tokens that adapts itself")
    max_num_active_seqs: int | None = not_built(None, "a limit of sequences besides max_num_seqs")
    max_num_queued_reqs: int | None = not_built(None, "a limit of waiting requests")
    max_num_queued_tokens: int | None = not_built(None, "a limit of waiting requests")
    logprobs_mode: str | None = implemented(
        None,
        OneOf(optional=True, values=("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")),
        "What log-probabilities show: logits or their log-softmax, before (raw) or after (processed) penalties, "
        "temperature and filters. Unset: as compat_version says.",
    )
    use_fp64_gumbel: bool = not_built(False, "sampling in double precision")
    enable_trace_replay: bool = immaterial(False, "requests with trace_decode_token_ids need nothing set up")
    aggregate_engine_logging: bool = immaterial(False, ONE_DEVICE)
    hf_token: bool | str | None = implemented(
        None, Token(optional=True), "Access token of the hub, or True for the stored one.", show=False
    )
    model_class_overrides: dict[str, str] | None = not_built(None, "another model class")
    quantization_config: Any = not_built(None, "quantising weights while they are loaded")
    allow_deprecated_quantization: bool = immaterial(False, "no quantization that taco knows is deprecated")
    enable_shm_tensor_arena: bool = immaterial(False, ONE_DEVICE)
    language_model_only: bool = immaterial(False, NO_MEDIA)
    enable_mm_embeds: bool = not_built(False, "multimodal input")
    interleave_mm_strings: bool = not_built(False, "multimodal input")
    media_io_kwargs: dict[str, Any] | None = not_built(None, "multimodal input")
    mm_processor_cache_gb: float = immaterial(4, NO_MEDIA)
    mm_processor_cache_type: str | None = immaterial("lru", NO_MEDIA)
    mm_hasher_algorithm: str = immaterial("blake3", NO_MEDIA)
    mm_shm_cache_max_object_size_mb: int = immaterial(128, NO_MEDIA)
    mm_encoder_only: bool = not_built(False, "running a media encoder alone")
    mm_encoder_tp_mode: str = immaterial("weights", NO_MEDIA)
    mm_encoder_attn_backend: Any = immaterial(None, NO_MEDIA)
    mm_encoder_attn_dtype: str | None = immaterial(None, NO_MEDIA)
    mm_encoder_fp8_scale_path: str | None = immaterial(None, NO_MEDIA)
    mm_encoder_fp8_scale_save_path: str | None = not_built(None, "writing scales of a media encoder")
    mm_encoder_fp8_scale_save_margin: float = immaterial(1.5, NO_MEDIA)
    io_processor_plugin: str | None = not_built(None, "plugins for input and output")
    renderer_num_workers: int = immaterial(1, ONE_TOKENIZER)
    skip_mm_profiling: bool = immaterial(False, NO_MEDIA)
    video_pruning_rate: float | None = immaterial(None, NO_MEDIA)
    video_pruning_method: str = immaterial("evs", NO_MEDIA)
    mm_tensor_ipc: str = immaterial("direct_rpc", NO_MEDIA)
    mm_processor_device: str = immaterial("auto", NO_MEDIA)
    mm_ipc_gpu_memory_gb: float = immaterial(0, NO_MEDIA)
    mm_device_do_normalize: bool | None = immaterial(True, NO_MEDIA)
    default_mm_loras: dict[str, str] | None = immaterial(None, NO_LORA)
    lora_target_modules: list[str] | None = immaterial(None, NO_LORA)
    enable_tower_connector_lora: bool = immaterial(False, NO_LORA)
    specialize_active_lora: bool = immaterial(False, NO_LORA)
    enable_mixed_moe_lora_format: bool = immaterial(False, NO_LORA)
    enable_moe_shared_loras: bool = immaterial(False, NO_LORA)
    max_lora_cls_labels: int | None = immaterial(None, NO_LORA)
    disable_chunked_mm_input: bool = immaterial(False, NO_MEDIA)
    scheduler_reserve_full_isl: bool = not_built(True, "another admission of prompts")
    prefill_schedule_interval: int = not_built(1, "steps without prompts")
    watermark: float = not_built(0.0, "a reserve of free blocks")
    disable_hybrid_kv_cache_manager: bool | None = not_built(
        None, "a KV cache with a layout for each kind of layer", also=(True,)
    )
    structured_outputs_config: Any = implemented(
        None,
        StructuredOutputsRule(optional=True),
        "What holds for guided decoding where a request does not say otherwise: a `StructuredOutputsConfig`, or a dict "
        "of its fields backend, disable_any_whitespace, disable_additional_properties, reasoning_parser and "
        "enable_in_reasoning.",
    )
    aux_output_config: Any = not_built(None, "auxiliary outputs")
    reasoning_parser: str = implemented(
        "",
        ReasoningParser(),
        "Kind of reasoning model: it says which marks enclose reasoning, for `SamplingParams.thinking_token_budget`.",
    )
    reasoning_parser_plugin: str | None = not_built(None, "parsing of reasoning")
    speculative_config: dict[str, Any] | None = not_built(None, "speculative decoding")
    spec_method: str | None = not_built(None, "speculative decoding")
    spec_model: str | None = not_built(None, "speculative decoding")
    spec_tokens: int | None = not_built(None, "speculative decoding")
    watermark_config: Any = implemented(
        None,
        WatermarkRule(optional=True),
        "How drawn tokens are marked: a `taco.watermark.WatermarkConfig` or a dict of its fields, such as key.",
        show=False,
    )
    diffusion_config: dict[str, Any] | None = not_built(None, "diffusion models")
    show_hidden_metrics_for_version: str | None = immaterial(None, "no metric is hidden")
    per_request_spec_decode_metrics: str = not_built("none", "metrics of speculative decoding")
    kv_cache_metrics: bool = not_built(False, "metrics of the life of blocks")
    kv_cache_metrics_sample: float = immaterial(0.01, "it is read only together with kv_cache_metrics")
    custom_histogram_buckets: dict[str, list[float]] | None = not_built(None, "histograms of metrics")
    cudagraph_metrics: bool = not_built(False, "metrics of CUDA graphs")
    enable_layerwise_nvtx_tracing: bool = not_built(False, "NVTX tracing")
    enable_mfu_metrics: bool = not_built(False, "metrics of the use of the device")
    enable_logging_iteration_details: bool = not_built(False, "logging of every step")
    jit_monitor_mode: str = immaterial("warn", "nothing is compiled while it runs")
    jit_monitor_verbose: bool = immaterial(False, "nothing is compiled while it runs")
    enable_mm_processor_stats: bool = not_built(False, "metrics of multimodal input")
    scheduler_cls: Any = not_built(None, "another scheduler class")
    pooler_config: Any = implemented(
        None,
        PoolerRule(optional=True),
        "How a pooling model pools, where that is not what its files say: a `PoolerConfig` or a dict of its fields.",
    )
    attention_config: Any = not_built(None, "the choice of an attention backend")
    engram_config: Any = not_built(None, "models with engrams")
    mamba_config: Any = immaterial(None, NO_STATE_SPACE)
    kernel_config: Any = not_built(None, "the choice of kernels")
    enable_flashinfer_autotune: bool | None = immaterial(None, "FlashInfer is not used")
    monokernel: bool = not_built(False, "the choice of kernels")
    worker_extension_cls: Any = implemented(
        "", ClassName(), "Class whose methods the worker gets, for `LLM.collective_rpc`: `module.name`."
    )
    profiler_config: Any = implemented(
        None,
        ProfilerRule(optional=True),
        "What `LLM.start_profile` records: a `ProfilerConfig` or a dict of its fields, such as torch_profiler_dir. "
        "Unset: what the environment variables VLLM_TORCH_PROFILER_* say.",
    )
    logging_config: Any = not_built(None, 'set-up of logging other than by the logger "taco"')
    log_level: str | None = not_built(None, 'set-up of logging other than by the logger "taco"')
    log_config_file: str | None = not_built(None, 'set-up of logging other than by the logger "taco"')
    kv_events_config: Any = not_built(None, "events of the KV cache")
    ec_transfer_config: Any = not_built(None, "sending encoder results to other engines")
    ec_manager_config: Any = immaterial(None, NO_MEDIA)
    reasoning_config: Any = implemented(
        None,
        ReasoningRule(optional=True),
        "Marks that enclose reasoning: a `taco.config.ReasoningConfig` or a dict of its fields, reasoning_start_str "
        "and reasoning_end_str.",
    )
    enable_sleep_mode: bool = immaterial(False, SLEEPS)
    sleep_mode_backend: str = immaterial("cumem", SLEEPS)
    sleep_mode_offload_cudagraph: bool = immaterial(False, EAGER)
    sleep_preserve_parameter_names: list[str] | None = not_built(None, "keeping some weights through a deep sleep")
    enable_cumem_allocator: bool = not_built(False, "another allocator of GPU memory")
    enable_nccl_comm_suspend: bool = immaterial(False, ONE_DEVICE)
    override_generation_config: dict[str, Any] | None = implemented(
        None, JsonObject(optional=True), "Values that replace or extend what generation_config says."
    )
    model_impl: str = not_built("auto", "another implementation of the models", also=("vllm",))
    attention_backend: Any = not_built(None, "the choice of an attention backend")
    kv_cache_dtype_skip_layers: list[str] | None = immaterial(None, "it is read only with a quantised KV cache")
    mamba_cache_dtype: str = immaterial("auto", NO_STATE_SPACE)
    mamba_ssm_cache_dtype: str = immaterial("auto", NO_STATE_SPACE)
    mamba_block_size: int | None = immaterial(None, NO_STATE_SPACE)
    prefix_match_unit: int | None = not_built(None, "prefix cache entries of another length than a block")
    mamba_cache_mode: str | None = immaterial(None, NO_STATE_SPACE)
    enable_mamba_shared_prefix_checkpoint: bool = immaterial(False, NO_STATE_SPACE)
    replayssm_buffer_len: int = immaterial(16, NO_STATE_SPACE)
    use_replayssm: bool = immaterial(False, NO_STATE_SPACE)
    mamba_backend: Any = immaterial("triton", NO_STATE_SPACE)
    mamba_ssu_algorithm: Any = immaterial(None, NO_STATE_SPACE)
    enable_mamba_cache_stochastic_rounding: bool = immaterial(False, NO_STATE_SPACE)
    mamba_cache_philox_rounds: int = immaterial(0, NO_STATE_SPACE)
    additional_config: dict[str, Any] | None = not_built(None, "configuration of a platform plugin")
    use_tqdm_on_load: bool = immaterial(True, "loading shows no progress bar")
    pt_load_map_location: Any = immaterial("cpu", LOADER)
    logits_processors: list[Any] | None = implemented(
        None,
        LogitsProcessorsRule(optional=True),
        "Classes derived from `taco.logits_processor.LogitsProcessor`, or their names as package.module:Class, whose "
        "objects edit the logits of every step. Unset: none.",
    )
    async_scheduling: bool | None = implemented(
        None,
        OPTIONAL_SWITCH,
        "Plan a step while the previous one runs. Unset: on a GPU, unless disable_async_output_proc.",
    )
    stream_interval: int = not_built(1, "outputs of every few tokens")
    kv_sharing_fast_prefill: bool = not_built(False, "skipping layers in a prefill")
    swa_bounded_replay: bool = not_built(True, "another treatment of sliding windows")
    optimization_level: Any = immaterial(2, EAGER)
    performance_mode: str = not_built("balanced", "planning for short response times", also=("throughput",))
    fault_tolerance_config: Any = not_built(None, "fault tolerance between engines")
    enable_fault_tolerance: bool = not_built(False, "fault tolerance between engines")
    kv_offloading_size: float | None = not_built(None, "a second level of the KV cache")
    kv_offloading_backend: str = immaterial("native", "it is read only together with kv_offloading_size")
    tokens_only: bool = not_built(False, "an engine that takes token ids alone, other than by skip_tokenizer_init")
    shutdown_timeout: int = immaterial(0, "closing the engine waits for nothing")
    watchdog_config: Any = not_built(None, "a watchdog")
    weight_transfer_config: Any = not_built(None, "receiving new weights")
    fail_on_environ_validation: bool = not_built(False, "checking the names of environment variables")
    gdn_prefill_backend: str | None = immaterial(None, NO_STATE_SPACE)
    kda_prefill_backend: str | None = immaterial(None, NO_STATE_SPACE)
    kda_decode_backend: str | None = immaterial(None, NO_STATE_SPACE)

    # Names of TACO-LLM.
    max_context_len_to_capture: int | None = immaterial(None, EAGER, obsolete=True)
    lookahead_cache_config_dir: str | None = not_built(None, "the lookahead cache")
    enable_prefix_cache_offload: bool = not_built(False, "a second level of the prefix cache")
    cpu_prefill_memory_utilization: float = immaterial(0.3, "it is read only together with enable_prefix_cache_offload")
    cpu_decoding_memory_utilization: float = immaterial(0.15, NO_LOOKAHEAD)
    sequence_parallel_size: int = not_built(1, "sequence parallelism")
    conservative_dry_run: bool = not_built(False, "a start-up probe of memory inside kernels")

    # An argument of LLM in vLLM 0.33, and taco's own.
    chat_template: str | None = implemented(
        None, OPTIONAL_TEXT, "Jinja template for chats, instead of the tokenizer's: a file or the text itself."
    )
    compat_version: str | None = implemented(
        None,
        OPTIONAL_TEXT,
        'Whose behaviour holds where versions of vLLM differ: "0.6" or "0.33". Unset: that of the vllm alias, '
        'else "0.6".',
    )

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add a flag for every implemented field: `--max-num-seqs`, for switches `--enforce-eager` and its `--no-`."""
        for name, field, treatment in _table(cls):
            if isinstance(treatment, Implemented):
                help = treatment.help + ("" if field.default is None else f" (default: {field.default})")
                flag = "--" + name.replace("_", "-")
                parser.add_argument(flag, dest=name, default=field.default, help=help, **treatment.rule.flag_options())
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """Arguments from a parsed command line; fields without an attribute in `args` keep their defaults."""
        return cls(**{name: getattr(args, name) for name, _, _ in _table(cls) if hasattr(args, name)})

    def create_engine_config(self, usage_context: UsageContext | None = None, headless: bool = False) -> TacoConfig:
        """`create_config`, under vLLM's name.

        Args:
            usage_context: accepted and without effect: taco reports its use to nobody.
            headless: must be False: there are no nodes without an engine of their own.
        """
        if headless:
            raise UnsupportedFeatureError("headless is not supported; leave it out.", parameter="headless", value=True)
        return self.create_config()

    def create_model_config(self) -> ModelConfig:
        """The part of `create_config` that describes the model."""
        return self.create_config().model_config

    def create_load_config(self) -> LoadConfig:
        """The part of `create_config` that says how weights are loaded; the model is not looked for.

        Raises:
            TacoValidationError: as by `create_config`, as far as arguments are wrong by themselves.
        """
        return self._valid()._load_config()

    def create_watermark_config(self) -> WatermarkConfig | None:
        """The part of `create_config` that says how texts are marked; errors as for `create_load_config`."""
        return cast("WatermarkConfig | None", self._valid().watermark_config)

    def create_structured_outputs_config(self) -> StructuredOutputsConfig:
        """What was given as `structured_outputs_config`, else its defaults; errors as for `create_load_config`."""
        return self._valid().structured_outputs_config or StructuredOutputsConfig()

    def validate_tensorizer_args(self) -> None:
        """Checks all arguments, with errors as for `create_load_config`; what taco does not have is refused there."""
        self._valid()

    # None, as what they configure is refused.
    create_diffusion_config = create_logging_config = create_observability_config = validate_tensorizer_args

    def create_speculative_config(self, target_model_config: object, target_parallel_config: object) -> None:
        """None, as speculative decoding is refused; errors as for `create_load_config`."""
        self._valid()

    @classmethod
    def get_batch_defaults(cls, world_size: int) -> tuple[dict[UsageContext, int], dict[UsageContext, int]]:
        """`max_num_batched_tokens` and `max_num_seqs` where nobody states them, by what uses the engine.

        Args:
            world_size: without effect: there is one device.
        """
        num_tokens = DEFAULT_NUM_BATCHED_TOKENS[resolve_device("auto")]
        return dict.fromkeys(UsageContext, num_tokens), dict.fromkeys(UsageContext, DEFAULT_NUM_SEQS)

    def create_config(self) -> TacoConfig:
        """Check every argument, find the model and resolve what depends on it.

        Raises:
            UnsupportedFeatureError: arguments ask for what this version does not have.
            TacoValidationError: arguments are wrong; one error lists all of them. Arguments that depend on the model
                are checked after the others.
        """
        from taco.models.loader.sentence_transformers import read_sentence_transformers_files
        from taco.models.loader.source import load_generation_config
        from taco.models.registry import known_architecture

        problems = Problems()
        args = self._checked(problems)
        with problems.collecting():
            behaviour = behaviour_for(args.compat_version)
        with problems.collecting():
            envs.check_vllm_variables()
        with problems.collecting():
            device = resolve_device(args.device)
        with problems.collecting():
            cpu_kv_cache_bytes = resolve_cpu_kv_cache_bytes(args.kv_cache_memory_bytes)
        with problems.collecting():
            log_stats_interval_s = None if args.disable_log_stats else envs.log_stats_interval_s()
        with problems.collecting():
            chat_template = read_chat_template(args.chat_template)
        with problems.collecting():
            constraints = args.structured_outputs_config or StructuredOutputsConfig()
            reasoning_parser = args.reasoning_parser or constraints.reasoning_parser
            reasoning_config = complete_reasoning_config(args.reasoning_config, reasoning_parser)
        with problems.collecting():
            check_generation_overrides(args.override_generation_config or {})
        with problems.collecting():
            separate_generation_config = read_generation_config(args.generation_config)
        with problems.collecting():
            guided_decoding_config = resolve_guided_decoding(args)
        check_combinations(args, problems)
        problems.raise_all()

        source, hf_config = args._find_model()
        text_config = hf_config.get_text_config()
        architecture = known_architecture(text_config)
        files = read_sentence_transformers_files(source.path) if source.kind == "hf" else None
        task: Task = "generate"
        pooler, is_encoder = None, False
        given = args.pooler_config or args.override_pooler_config
        with problems.collecting():
            if tokens := scores_by_tokens(text_config):
                text_config.score_token_ids = args._token_ids(tokens, source)
            task = resolve_task(args, text_config, architecture, files)
            if task != "generate":
                pooler = resolve_pooler(given or PoolerConfig(), task, text_config, architecture, files)
                if args.logits_processors:
                    problems.add("logits_processors: a pooling model has no logits; drop the argument")
            elif given is not None:
                problems.add('pooler_config: the model is to generate text; pass task="embed", or drop it')
            is_encoder = architecture.is_encoder
            if is_encoder:
                args = for_encoder(args)
        with problems.collecting():
            check_quantization(hf_config, source, args.quantization)
        with problems.collecting():
            check_rope(text_config, args)
        with problems.collecting():
            trained_len = files.max_seq_length if files is not None and pooler is not None else None
            max_model_len = resolve_max_model_len(text_config, args, trained_len)
            max_num_seqs, max_num_batched_tokens = resolve_batch_limits(args, max_model_len, device)
        with problems.collecting():
            own_generation_config = load_generation_config(source, hf_config)
        problems.raise_all()

        dtype = resolve_dtype(
            args.dtype, checkpoint_dtype(hf_config), text_config.model_type, device, behaviour, pools=pooler is not None
        )
        # On a CPU the device work of a step runs in this thread, so there is nothing to overlap it with.
        use_async = first_given(args.async_scheduling, device != "cpu" and not args.disable_async_output_proc)
        default_logprobs_mode = "processed_logprobs" if behaviour.logprobs_after_processing else "raw_logprobs"
        overrides = args.override_generation_config or {}
        overridden_eos = {name: value for name, value in overrides.items() if name == "eos_token_id"}
        sampling_source = own_generation_config if separate_generation_config is None else separate_generation_config
        return TacoConfig(
            model_config=ModelConfig(
                model=args.model,
                source=source,
                tokenizer=args.tokenizer or args.model,
                tokenizer_mode=cast(Literal["auto", "slow", "mistral"], args.tokenizer_mode),
                skip_tokenizer_init=args.skip_tokenizer_init,
                trust_remote_code=args.trust_remote_code,
                revision=args.revision,
                tokenizer_revision=args.tokenizer_revision or args.revision,
                code_revision=args.code_revision,
                hf_token=args.hf_token,
                dtype_name=dtype,
                seed=args.seed or 0,
                max_model_len=max_model_len,
                fit_max_model_len=args.max_model_len == FIT_MAX_MODEL_LEN,
                max_logprobs=text_config.vocab_size if args.max_logprobs == -1 else args.max_logprobs,
                logprobs_mode=args.logprobs_mode or default_logprobs_mode,
                served_model_name=args.served_model_name[0] if args.served_model_name else args.model,
                hf_config=hf_config,
                hf_text_config=text_config,
                # A separate file may lack the model's end-of-sequence tokens, without which texts would not end.
                generation_config=own_generation_config | (separate_generation_config or {}) | overridden_eos,
                default_sampling_params=resolve_default_sampling_params(args, sampling_source, behaviour),
                vocab_size=text_config.vocab_size,
                quantization="gguf" if source.kind == "gguf" else None,
                chat_template=chat_template,
                hf_overrides=args.hf_overrides,
                enforce_eager=bool(args.enforce_eager),
                max_seq_len_to_capture=args.max_seq_len_to_capture,
                use_async_output_proc=use_async,
                task=task,
                is_encoder=is_encoder,
                pooler_config=pooler,
                logits_processors=tuple(args.logits_processors or ()),
            ),
            cache_config=CacheConfig(
                block_size=first_given(args.block_size, DEFAULT_BLOCK_SIZE),
                gpu_memory_utilization=args.gpu_memory_utilization,
                swap_space_bytes=resolve_swap_space_bytes(args, device),
                kv_cache_dtype=dtype,
                enable_prefix_caching=first_given(args.enable_prefix_caching, behaviour.prefix_caching_default),
                num_gpu_blocks_override=args.num_gpu_blocks_override,
                kv_cache_memory_bytes=args.kv_cache_memory_bytes,
                cpu_kv_cache_bytes=cpu_kv_cache_bytes,
            ),
            scheduler_config=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=max_model_len,
                policy=cast(Literal["fcfs", "priority"], args.scheduling_policy),
                enable_chunked_prefill=args.enable_chunked_prefill is not False,
                preemption_mode=cast(Literal["swap", "recompute"] | None, args.preemption_mode),
                async_scheduling=use_async,
                long_prefill_token_threshold=args.long_prefill_token_threshold,
            ),
            device_config=DeviceConfig(device=device),
            load_config=args._load_config(),
            parallel_config=ParallelConfig(
                tensor_parallel_size=args.tensor_parallel_size,
                pipeline_parallel_size=args.pipeline_parallel_size,
                data_parallel_size=args.data_parallel_size,
                worker_extension_cls=args.worker_extension_cls or None,
            ),
            behaviour=behaviour,
            profiler_config=args.profiler_config or profiler_from_environment(),
            reasoning_config=reasoning_config,
            watermark_config=args.watermark_config,
            guided_decoding_config=guided_decoding_config,
            log_stats_interval_s=log_stats_interval_s,
        )

    def _checked(self, problems: Problems) -> Self:
        """A copy with canonical values; where a value is wrong, it has the default and `problems` the error."""
        values: dict[str, Any] = {}
        for name, field, treatment in _table(type(self)):
            values[name] = field.default
            with problems.collecting():
                values[name] = treatment.check(name, getattr(self, name), field.default)
        return type(self)(**values)

    def _valid(self) -> Self:
        """A copy with canonical values, each of which is right by itself."""
        problems = Problems()
        args = self._checked(problems)
        problems.raise_all()
        return args

    def _load_config(self) -> LoadConfig:
        return LoadConfig(
            load_format=self.load_format,
            download_dir=self.download_dir,
            ignore_patterns=tuple(self.ignore_patterns or ()),
        )

    def _find_model(self) -> tuple[ModelSource, PretrainedConfig]:
        """Where the weights are on this machine, after a download if need be, and the config of the model."""
        from taco.models.loader.source import load_hf_config, resolve_model

        rope = {"rope_scaling": self.rope_scaling, "rope_theta": self.rope_theta}
        rope = {name: value for name, value in rope.items() if value is not None}
        # check_combinations has seen to it that a callable does not meet rope arguments.
        hf_overrides = {**(self.hf_overrides or {}), **rope} if rope else self.hf_overrides
        source = resolve_model(
            self.model,
            revision=self.revision,
            download_dir=self.download_dir,
            hf_token=self.hf_token,
            load_format=self.load_format,
            ignore_patterns=list(self.ignore_patterns) if self.ignore_patterns else None,
        )
        hf_config = load_hf_config(
            source,
            trust_remote_code=self.trust_remote_code,
            revision=self.code_revision,
            hf_overrides=hf_overrides,
        )
        return source, hf_config

    def _token_ids(self, tokens: list[str], source: ModelSource) -> list[int]:
        """Ids of tokens of the tokenizer, which is the one that the engine will load."""
        from taco.tokenizer.loading import load_tokenizer

        revision = self.tokenizer_revision or self.revision
        is_models_own = self.tokenizer in (None, self.model) and revision == self.revision
        tokenizer = load_tokenizer(
            source if is_models_own else self.tokenizer or self.model,
            tokenizer_mode=self.tokenizer_mode,
            trust_remote_code=self.trust_remote_code,
            revision=revision,
            download_dir=self.download_dir,
            hf_token=self.hf_token,
        )
        ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
        if unknown := [
            token for token, found in zip(tokens, ids, strict=True) if found in (None, tokenizer.unk_token_id)
        ]:
            raise TacoValidationError(f"classifier_from_token: the tokenizer does not have {unknown}")
        return ids


@dataclass
class AsyncEngineArgs(EngineArgs):
    """`EngineArgs` with the names that vLLM's asynchronous engine adds."""

    disable_log_requests: bool = immaterial(False, "requests are never logged", obsolete=True)
    enable_log_requests: bool = not_built(False, "logging of every request")

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser, async_args_only: bool = False) -> argparse.ArgumentParser:
        """As `EngineArgs.add_cli_args`.

        Args:
            async_args_only: add none of the flags of `EngineArgs`, which leaves none at all: what this class adds to
                it is not implemented.
        """
        return parser if async_args_only else super().add_cli_args(parser)


def _table(cls: type[EngineArgs]) -> Iterator[tuple[str, dataclasses.Field[Any], Treatment]]:
    for field in dataclasses.fields(cls):
        yield field.name, field, treatment_of(field)
