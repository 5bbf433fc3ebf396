"""Environment variables; the only file that reads them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from taco.errors import TacoValidationError, UnsupportedFeatureError

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Folder of what can be fetched again: TACO_CACHE_HOME, else XDG_CACHE_HOME/taco, else ~/.cache/taco."""
    if home := os.environ.get("TACO_CACHE_HOME"):
        return Path(home).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "taco"
    return Path.home() / ".cache" / "taco"


def cpu_kv_cache_space_gib() -> float | None:
    """Memory for the KV cache on a CPU in GiB, from VLLM_CPU_KVCACHE_SPACE; None where it is unset or 0.

    Raises:
        TacoValidationError: the variable does not hold a number of at least 0.
    """
    text = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "").strip()
    if not text:
        return None
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < float("inf"):
        raise TacoValidationError(
            f"The environment variable VLLM_CPU_KVCACHE_SPACE is {text!r}; it must be a number of GiB, such as 4.",
            parameter="VLLM_CPU_KVCACHE_SPACE",
            value=text,
        )
    return gib or None


def world_size() -> int:
    """Number of processes that a launcher such as torchrun has started together, from WORLD_SIZE; 1 where it is unset.

    Raises:
        TacoValidationError: the variable does not hold a number above 0.
    """
    text = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if not text.isdecimal() or int(text) < 1:
        raise TacoValidationError(
            f"The environment variable WORLD_SIZE is {text!r}; it must be a number of processes.",
            parameter="WORLD_SIZE",
            value=text,
        )
    return int(text)


def torch_profiler_options() -> dict[str, str | bool] | None:
    """Fields of `taco.config.ProfilerConfig` from VLLM_TORCH_PROFILER_DIR and the four variables that go with it; None
    where that is unset."""
    folder = os.environ.get("VLLM_TORCH_PROFILER_DIR", "").strip()
    if not folder:
        return None
    options: dict[str, str | bool] = {"torch_profiler_dir": folder}
    for field, name in _TORCH_PROFILER_SWITCHES.items():
        if text := os.environ.get(name, "").strip():
            options[field] = text not in ("0", "false", "False")
    return options


_TORCH_PROFILER_SWITCHES = {
    "torch_profiler_record_shapes": "VLLM_TORCH_PROFILER_RECORD_SHAPES",
    "torch_profiler_with_memory": "VLLM_TORCH_PROFILER_WITH_PROFILE_MEMORY",
    "torch_profiler_with_stack": "VLLM_TORCH_PROFILER_WITH_STACK",
    "torch_profiler_with_flops": "VLLM_TORCH_PROFILER_WITH_FLOPS",
}


def log_stats_interval_s() -> float:
    """Seconds between two lines about the engine in the log, from VLLM_LOG_STATS_INTERVAL; 10 where it is unset.

    Raises:
        TacoValidationError: the variable does not hold a number above 0.
    """
    text = os.environ.get("VLLM_LOG_STATS_INTERVAL", "").strip() or "10"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise TacoValidationError(
            f"The environment variable VLLM_LOG_STATS_INTERVAL is {text!r}; it must be a number of seconds above 0.",
            parameter="VLLM_LOG_STATS_INTERVAL",
            value=text,
        )
    return seconds


def limit_onednn_caches(num_entries: int = 128) -> None:
    """Bounds what oneDNN keeps of products it has prepared, unless the environment says otherwise.

    It keeps up to 1024 shapes, and a batch has another number of tokens in almost every step: hundreds of megabytes for
    shapes that seldom come again. To be called before the first product; later it has no effect.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(num_entries))


def native_kernels() -> str:
    """Which native CPU kernels to use, from TACO_NATIVE_KERNELS: "" for the best that the processor has, "0" for none,
    or the name of an instruction set ("amx", "avx512_bf16", "avx512", "avx2")."""
    return os.environ.get("TACO_NATIVE_KERNELS", "").strip()


# Variables of vLLM that cannot change a result here, or ask for nothing but what taco does anyway, and why.
_WITHOUT_EFFECT = {
    "the engine runs in the process that made it": "VLLM_ENABLE_V1_MULTIPROCESSING VLLM_WORKER_MULTIPROC_METHOD "
    "VLLM_HOST_IP VLLM_PORT VLLM_RPC_BASE_PATH VLLM_SKIP_P2P_CHECK VLLM_ALLOW_INSECURE_SERIALIZATION "
    "VLLM_ENGINE_ITERATION_TIMEOUT_S VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS VLLM_PP_LAYER_PARTITION VLLM_DP_RANK "
    "VLLM_DP_RANK_LOCAL VLLM_DP_SIZE VLLM_DP_MASTER_IP VLLM_DP_MASTER_PORT",
    "there is one engine, scheduler and block manager": "VLLM_USE_V1 VLLM_ALLOW_DEPRECATED_BLOCK_MANAGER_V1",
    "kernels are chosen by what is asked of them": "VLLM_ATTENTION_BACKEND VLLM_FLASH_ATTN_VERSION "
    "VLLM_USE_FLASHINFER_SAMPLER VLLM_USE_TRITON_FLASH_ATTN VLLM_USE_TRITON_AWQ VLLM_DISABLED_KERNELS "
    "VLLM_FLOAT32_MATMUL_PRECISION",
    "nothing is compiled or cached in its folders": "VLLM_DISABLE_COMPILE_CACHE VLLM_CACHE_ROOT VLLM_CONFIG_ROOT "
    "VLLM_ASSETS_CACHE",
    "taco reports its use to nobody": "VLLM_NO_USAGE_STATS VLLM_DO_NOT_TRACK VLLM_USAGE_SOURCE VLLM_USAGE_STATS_SERVER",
    'logs go to the logger "taco", which the program sets up': "VLLM_LOGGING_LEVEL VLLM_LOGGING_PREFIX "
    "VLLM_CONFIGURE_LOGGING",
    "there is no server": "VLLM_API_KEY VLLM_SERVER_DEV_MODE VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
    "there are no images, audio and video": "VLLM_IMAGE_FETCH_TIMEOUT VLLM_VIDEO_FETCH_TIMEOUT "
    "VLLM_AUDIO_FETCH_TIMEOUT VLLM_MM_INPUT_CACHE_GIB",
    "a max_model_len beyond the model's is refused with the arguments that extend it": "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
}
# Variables without which something else would silently happen.
_NOT_BUILT = {
    "VLLM_BATCH_INVARIANT": "kernels whose results are bitwise the same for every batch",
    "VLLM_USE_MODELSCOPE": "fetching models from ModelScope",
}


def check_vllm_variables() -> None:
    """Looks at the environment variables of vLLM: of most, no value can matter.

    Raises:
        UnsupportedFeatureError: one asks for what this version does not have.
    """
    known = {"VLLM_CPU_KVCACHE_SPACE", "VLLM_TORCH_PROFILER_DIR", "VLLM_LOG_STATS_INTERVAL"}
    known = known.union(_TORCH_PROFILER_SWITCHES.values(), *(names.split() for names in _WITHOUT_EFFECT.values()))
    unknown = []
    for name, value in sorted(os.environ.items()):
        if name in _NOT_BUILT and value.strip().lower() not in ("", "0", "false"):
            raise UnsupportedFeatureError(
                f"The environment variable {name}={value!r} asks for {_NOT_BUILT[name]}, which this version of taco "
                "does not have; unset it.",
                parameter=name,
                value=value,
            )
        if name.startswith("VLLM_") and name not in known | _NOT_BUILT.keys():
            unknown.append(name)
    if unknown:
        logger.warning("These environment variables have no effect on taco: %s", ", ".join(unknown))
