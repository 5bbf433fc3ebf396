"""Environment variables; the only file that reads them."""

from __future__ import annotations

import os
from pathlib import Path

from taco.errors import TacoValidationError


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


def limit_onednn_caches(num_entries: int = 128) -> None:
    """Bounds what oneDNN keeps of products it has prepared, unless the environment says otherwise.

    It keeps up to 1024 shapes, and a batch has another number of tokens in almost every step: hundreds of megabytes for
    shapes that seldom come again. To be called before the first product; later it has no effect.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(num_entries))
