"""What the arguments of an engine come to, given each other, the machine and the model: the steps of
`EngineArgs.create_config`.

Errors name the argument; `Problems` collects them, so that a caller reads all at once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from taco import envs
from taco.compat import Behaviour
from taco.config import GuidedDecodingConfig, ProfilerConfig
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.guided.request import StructuredOutputsConfig, backend_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from taco.engine.arg_utils import EngineArgs
    from taco.models.loader.source import ModelSource

logger = logging.getLogger(__name__)

T = TypeVar("T")
Device = Literal["cpu", "cuda"]

GIB = 1 << 30
DEFAULT_BLOCK_SIZE = 16
DEFAULT_NUM_SEQS = 256
DEFAULT_NUM_BATCHED_TOKENS: dict[Device, int] = {"cpu": 2048, "cuda": 8192}
FIT_MAX_MODEL_LEN = -1  # max_model_len="auto"


class Problems:
    """Wrong arguments found so far, to be raised together."""

    def __init__(self) -> None:
        self._errors: list[TacoValidationError] = []

    def add(self, message: str) -> None:
        self._errors.append(TacoValidationError(message))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep an error of the caller's arguments for `raise_all`; what the block was to assign is then missing."""
        try:
            yield
        except TacoValidationError as error:
            self._errors.append(error)

    def raise_all(self) -> None:
        """Raise what was collected, as UnsupportedFeatureError if nothing else is wrong."""
        if not self._errors:
            return
        if len(self._errors) == 1:
            raise self._errors[0]
        only_unsupported = all(isinstance(error, UnsupportedFeatureError) for error in self._errors)
        cls = UnsupportedFeatureError if only_unsupported else TacoValidationError
        lines = "\n".join(f"  {error.message}" for error in self._errors)
        raise cls(f"{len(self._errors)} engine arguments are not valid:\n{lines}")


def check_combinations(args: EngineArgs, problems: Problems) -> None:
    """Add what is wrong about values that are right one by one."""
    if args.async_scheduling and args.disable_async_output_proc:
        problems.add("async_scheduling=True and disable_async_output_proc=True contradict each other; drop one of them")
    if args.pooler_config is not None and args.override_pooler_config is not None:
        problems.add("pooler_config and override_pooler_config are two names of the same; drop one of them")
    if args.quantization == "gguf" and args.load_format not in ("auto", "gguf"):
        problems.add(f'quantization="gguf" needs load_format="auto" or "gguf", not {args.load_format!r}')
    if args.rope_scaling is not None and not {"rope_type", "type"} & set(args.rope_scaling):
        problems.add(
            f'rope_scaling={args.rope_scaling!r}: needs a "rope_type", as in {{"rope_type": "yarn", "factor": 4.0}}'
        )
    if callable(args.hf_overrides) and (args.rope_scaling is not None or args.rope_theta is not None):
        problems.add("rope_scaling and rope_theta cannot go with a callable hf_overrides; set them in the callable")
    tokenizer = args.tokenizer or args.model
    if args.tokenizer_revision not in (None, args.revision) and Path(tokenizer).expanduser().exists():
        problems.add(
            f"tokenizer_revision={args.tokenizer_revision!r}: {tokenizer} is a local folder or file, which has no "
            "revisions; drop the argument, or pass the hub id of the tokenizer"
        )
    if args.preemption_mode == "swap" and args.swap_space == 0:
        problems.add('preemption_mode="swap" needs a swap_space above 0')
    if args.enable_chunked_prefill is False and args.long_prefill_token_threshold:
        problems.add(
            f"long_prefill_token_threshold={args.long_prefill_token_threshold} splits prompts, "
            "which enable_chunked_prefill=False forbids; drop one of them"
        )


def for_encoder(args: EngineArgs) -> EngineArgs:
    """Arguments for a model whose tokens also see those after them: nothing can be cached, no prompt can be split.

    Raises:
        TacoValidationError: an argument asks for one of these.
    """
    for name in ("enable_chunked_prefill", "enable_prefix_caching", "long_prefill_token_threshold"):
        if getattr(args, name):
            raise TacoValidationError(
                f"{name}={getattr(args, name)!r}: every token of an encoder model sees all others of its text, so that "
                "a text is computed in one step, and nothing of it can be used again; drop the argument",
                parameter=name,
                value=getattr(args, name),
            )
    return dataclasses.replace(args, enable_chunked_prefill=False, enable_prefix_caching=False)


def resolve_device(requested: str) -> Device:
    """The device for `device`: "cuda" only where torch finds one."""
    if requested == "cpu":
        return "cpu"
    import torch

    if torch.accelerator.is_available() and str(torch.accelerator.current_accelerator()).startswith("cuda"):
        return "cuda"
    if requested == "auto":
        return "cpu"
    raise TacoValidationError(
        'device="cuda": torch finds no CUDA device; pass device="cpu", or check the driver and install torch for CUDA',
        parameter="device",
        value=requested,
    )


def resolve_cpu_kv_cache_bytes(kv_cache_memory_bytes: int | None) -> int | None:
    """Size of the KV cache on a CPU: the argument, else VLLM_CPU_KVCACHE_SPACE, else None for the worker to choose."""
    if kv_cache_memory_bytes is not None:
        return kv_cache_memory_bytes
    gib = envs.cpu_kv_cache_space_gib()
    return None if gib is None else int(gib * GIB)


def resolve_swap_space_bytes(args: EngineArgs, device: str) -> int:
    """Size of the swap space: the argument, else 4 GiB where swapping is of use or asked for.

    Swapping on a CPU copies within one memory. A larger KV cache does more with the same bytes.
    """
    if args.swap_space is None:
        return 4 * GIB if device != "cpu" or args.preemption_mode == "swap" else 0
    return int(args.swap_space * GIB)


def profiler_from_environment() -> ProfilerConfig | None:
    """What the environment variables of vLLM say about profiling; None if nothing."""
    options = envs.torch_profiler_options()
    return None if options is None else ProfilerConfig(**options)  # type: ignore[arg-type]


def resolve_guided_decoding(args: EngineArgs) -> GuidedDecodingConfig:
    """What holds for guided decoding where a request does not say otherwise."""
    given = args.structured_outputs_config or StructuredOutputsConfig()
    backends = {
        backend_name(args.guided_decoding_backend, "guided_decoding_backend"),
        backend_name(given.backend, "structured_outputs_config.backend"),
    }
    if len(backends - {"auto"}) > 1:
        raise TacoValidationError(
            f"guided_decoding_backend={args.guided_decoding_backend!r} and structured_outputs_config with "
            f"backend={given.backend!r} contradict each other; give one of them"
        )
    return GuidedDecodingConfig(
        backend=next(iter(backends - {"auto"}), "auto"),
        disable_any_whitespace=given.disable_any_whitespace,
        disable_additional_properties=given.disable_additional_properties,
        enable_in_reasoning=given.enable_in_reasoning,
    )


def read_generation_config(name: str | None) -> dict[str, Any] | None:
    """Contents of generation_config.json in the folder that `generation_config` names; None where it names none."""
    from taco.models.loader.source import load_generation_config

    if name is None or name in ("auto", "vllm"):
        return None
    if not (Path(name) / "generation_config.json").is_file():
        raise TacoValidationError(
            f'generation_config={name!r}: must be "auto", "vllm", or a folder that has a generation_config.json',
            parameter="generation_config",
            value=name,
        )
    return load_generation_config(name)


# Which values of generation_config.json become sampling parameters: those of vLLM 0.6, and those that 0.33 added.
_SAMPLING_NAMES = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
_FURTHER_SAMPLING_NAMES = ("presence_penalty", "frequency_penalty", "max_new_tokens", "skip_special_tokens")
# What transformers 4 took a value for that a file does not have.
_TRANSFORMERS_DEFAULTS = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


def check_generation_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse names of `override_generation_config` that would have no effect, and wrong end-of-sequence tokens."""
    known = (*_SAMPLING_NAMES, *_FURTHER_SAMPLING_NAMES, "eos_token_id")
    if unknown := sorted(set(overrides) - set(known)):
        raise TacoValidationError(
            f"override_generation_config: {unknown} would have no effect; known are {list(known)}",
            parameter="override_generation_config",
            value=overrides,
        )
    eos = overrides.get("eos_token_id", [])
    if not all(type(token_id) is int for token_id in (eos if isinstance(eos, list) else [eos])):
        raise TacoValidationError(
            f"override_generation_config: eos_token_id must be an int or a list of ints, got {eos!r}",
            parameter="override_generation_config",
            value=overrides,
        )


def resolve_default_sampling_params(
    args: EngineArgs, generation_config: Mapping[str, Any], behaviour: Behaviour
) -> dict[str, Any]:
    """Sampling parameters of a caller who gives none, by the names of `SamplingParams`.

    Where the file applies unasked, all its sampling values do; else only those that vLLM 0.6 took from it. Values of
    `override_generation_config` always apply.
    """
    applies_unasked = behaviour.use_generation_config_defaults
    mode = args.generation_config or ("auto" if applies_unasked else "vllm")
    names = _SAMPLING_NAMES + (_FURTHER_SAMPLING_NAMES if applies_unasked else ())
    values = {} if mode == "vllm" else {name: generation_config.get(name) for name in names}
    if behaviour.drops_transformers_defaults:
        values = {name: value for name, value in values.items() if value != _TRANSFORMERS_DEFAULTS.get(name)}
    overrides = args.override_generation_config or {}
    values |= {name: overrides[name] for name in _SAMPLING_NAMES + _FURTHER_SAMPLING_NAMES if name in overrides}
    renamed = {"max_new_tokens": "max_tokens"}
    return {renamed.get(name, name): value for name, value in values.items() if value is not None}


def check_quantization(hf_config: PretrainedConfig, source: ModelSource, quantization: str | None) -> None:
    """Refuse checkpoints that are quantised in a way that cannot be read."""
    if source.kind == "gguf":
        return
    if quantization == "gguf":
        raise TacoValidationError(
            f'quantization="gguf" needs a .gguf file, and {source.path} is none; drop the argument',
            parameter="quantization",
            value=quantization,
        )
    details = getattr(hf_config, "quantization_config", None)
    if details:
        method = details.get("quant_method") if isinstance(details, Mapping) else getattr(details, "quant_method", None)
        raise UnsupportedFeatureError(
            f"model={str(source.path)!r}: its weights are quantised ({method}), which is not supported; take the model "
            "without quantization, or a .gguf file",
            parameter="model",
        )


def check_rope(text_config: PretrainedConfig, args: EngineArgs) -> None:
    """Refuse arguments about rotary embeddings for models that have none."""
    is_given = args.rope_scaling is not None or args.rope_theta is not None
    if is_given and not getattr(text_config, "rope_parameters", None):
        raise TacoValidationError(
            f"rope_scaling, rope_theta: a model of type {text_config.model_type!r} has no rotary embeddings; drop them"
        )


# Names under which configs say how many positions a model was made for. The smallest counts.
_MAX_LEN_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_target_positions",
    "model_max_length",
    "seq_length",
    "seq_len",
)


# Families whose first row of the position table that a token can have is the one after that of padding.
_POSITIONS_AFTER_PADDING = ("camembert", "roberta", "xlm-roberta", "xlm-roberta-xl")


def resolve_max_model_len(text_config: PretrainedConfig, args: EngineArgs, trained_len: int | None = None) -> int:
    """Most tokens of a sequence: what the model was made for, or less if the caller says so.

    `trained_len` is what an embedding model is made for by its authors; a caller may raise it to what the model allows.
    Linear and dynamic scaling of rotary embeddings and YaRN multiply the positions. Other kinds (Llama 3, LongRoPE)
    do not, since their configs state the multiplied number; neither do those of Gemma 3, for the same reason.
    """
    requested = cast(int | None, args.max_model_len)
    stated = {name: getattr(text_config, name, None) for name in _MAX_LEN_NAMES}
    known = {name: number for name, number in stated.items() if isinstance(number, int)}
    if not known:
        if requested is None or requested == FIT_MAX_MODEL_LEN:
            raise TacoValidationError(
                "max_model_len: the model's config does not say how long a sequence may be; pass a number",
                parameter="max_model_len",
                value=requested,
            )
        return requested

    name = min(known, key=lambda name: known[name])
    limit, origin = known[name], name
    if text_config.model_type in _POSITIONS_AFTER_PADDING:
        limit -= text_config.pad_token_id + 1
    rope = getattr(text_config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type")
    if rope_type in ("linear", "yarn") and "gemma3" not in text_config.model_type:
        start = rope.get("original_max_position_embeddings", limit) if rope_type == "yarn" else limit
        limit, origin = int(start * rope.get("factor", 1.0)), f"{name} with {rope_type} rope scaling"
    window = getattr(text_config, "sliding_window", None)
    if args.disable_sliding_window and window and getattr(text_config, "use_sliding_window", True):
        limit, origin = min(limit, window), "its sliding window, since disable_sliding_window=True"

    if requested is None or requested == FIT_MAX_MODEL_LEN:
        return min(limit, trained_len or limit)
    if requested > limit:
        raise TacoValidationError(
            f"max_model_len={requested}: the model has {limit} positions ({origin}); lower it, or stretch the model "
            'with rope_scaling, such as {"rope_type": "yarn", "factor": 4.0}, if it is made for that',
            parameter="max_model_len",
            value=requested,
        )
    return requested


def resolve_batch_limits(args: EngineArgs, max_model_len: int, device: Device) -> tuple[int, int]:
    """`max_num_seqs` and `max_num_batched_tokens`.

    A step of N tokens advances at most N sequences, so more are not admitted: their KV cache would lie idle.
    """
    num_seqs, num_tokens = args.max_num_seqs, args.max_num_batched_tokens
    is_chunked = args.enable_chunked_prefill is not False
    if num_tokens is None:
        num_tokens = max(DEFAULT_NUM_BATCHED_TOKENS[device], num_seqs or 0, 0 if is_chunked else max_model_len)
    elif not is_chunked and num_tokens < max_model_len:
        raise TacoValidationError(
            f"max_num_batched_tokens={num_tokens}: with enable_chunked_prefill=False a whole prompt must fit into a "
            f"step, so it must be at least max_model_len ({max_model_len}); raise it, lower max_model_len, or allow "
            "chunked prefill",
            parameter="max_num_batched_tokens",
            value=num_tokens,
        )
    if num_seqs is not None and num_seqs > num_tokens:
        logger.warning("max_num_seqs is lowered from %d to max_num_batched_tokens, %d.", num_seqs, num_tokens)
    return min(first_given(num_seqs, DEFAULT_NUM_SEQS), num_tokens), num_tokens


def checkpoint_dtype(hf_config: PretrainedConfig) -> str:
    """Data type that the config states; "float32" where it states none, as for .gguf files."""
    for config in (hf_config, hf_config.get_text_config()):
        dtype = getattr(config, "dtype", None)
        if dtype is not None:
            return str(dtype).removeprefix("torch.")
    return "float32"


def resolve_dtype(
    requested: str, checkpoint: str, model_type: str, device: Device, behaviour: Behaviour, *, pools: bool = False
) -> str:
    """Data type of weights and activations; one log line says what "auto" came to.

    On a GPU, "auto" keeps 16-bit types and halves others; for pooling models, whose results are the hidden states
    themselves, it halves them to float16, which is the more exact type. On a CPU it is bfloat16 where the processor
    computes in it, else float32: products in float16 are slow there. Gemma models overflow in float16 and get bfloat16.
    """
    is_gemma = model_type.startswith("gemma")
    if requested != "auto":
        if requested == "float16" and is_gemma:
            logger.warning('dtype="float16": activations of Gemma models overflow in it; prefer "bfloat16".')
        elif requested == "float16" and device == "cpu":
            logger.warning('dtype="float16" is slow on a CPU; prefer "bfloat16" or "float32".')
        return requested
    if device == "cpu":
        if cpu_has_bfloat16():
            dtype, reason = "bfloat16", "this processor computes in it"
        else:
            dtype, reason = "float32", "this processor has no bfloat16 instructions"
    elif checkpoint == "bfloat16":
        dtype, reason = "bfloat16", "it is the type of the checkpoint"
    elif is_gemma:
        dtype, reason = "bfloat16", "Gemma models overflow in float16"
    elif checkpoint == "float16":
        dtype, reason = "float16", "it is the type of the checkpoint"
    else:
        dtype = "float16" if pools or behaviour.dtype_auto_float32 == "float16" else "bfloat16"
        reason = "it takes half the memory"
    logger.info('dtype="auto" is %s for this %s checkpoint: %s.', dtype, checkpoint, reason)
    return dtype


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    names = {"avx512_bf16", "amx_bf16", "bf16"}
    import torch

    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.13 and later
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in names)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(names & set(line.split()) for line in lines if line.startswith(("flags", "Features")))


def first_given(value: T | None, default: T) -> T:
    """`value`, or `default` where it is None."""
    return default if value is None else value
