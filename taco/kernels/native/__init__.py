"""Kernels in C for CPUs: the library, and its structures as ctypes sees them.

The library is compiled when taco is installed (pyproject.toml) and holds one version for each instruction set, of
which the best that the processor has is chosen when it is loaded. Nothing is compiled at run time. Where there was no
compiler, or the processor is none of those supported, the candidates that need it decline and torch's operators do the
work, several times more slowly; `why_missing` says why.

It shares torch's OpenMP threads: torch is imported first, and the loader does not load a second runtime of the name.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TypeVar

import torch

from taco import envs
from taco.errors import TacoValidationError

T = TypeVar("T")

TILE = 32  # TACO_TILE
TYPES = {torch.float32: 0, torch.bfloat16: 1}
GROUP = {torch.float32: 1, torch.bfloat16: 2}  # values along k that stand together in a packed weight
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class Weight(ctypes.Structure):
    """taco_weight"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
    ]


class Layer(ctypes.Structure):
    """taco_layer"""

    _fields_ = [
        *((name, Weight) for name in ("qkv", "output", "gate_up", "down")),
        *(
            (name, ctypes.c_void_p)
            for name in ("input_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm", "qk_norm")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "window",
                "activation",
            )
        ),
        *((name, ctypes.c_float) for name in ("eps", "qk_eps", "scale")),
    ]


class Batch(ctypes.Structure):
    """taco_batch"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query_start", "seq_lens", "block_tables", "slots", "tasks", "members")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "max_blocks", "block_size", "num_tasks", "num_threads")),
    ]


class Scratch(ctypes.Structure):
    """taco_scratch"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("normed", "heads", "attended", "gate_up", "activated", "attention")),
        ("chunk", ctypes.c_int64),
    ]


WORK = ctypes.CFUNCTYPE(None)
_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS = {
    "taco_linear": (_INT, _POINTER, _INT64, _INT64, _POINTER, _POINTER, _INT64, _INT, _INT),
    "taco_attention": (_INT, _POINTER, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _POINTER, _POINTER),
    "taco_top": (_POINTER, _INT64, _INT64, _INT64, _POINTER, _POINTER, _INT),
    "taco_score": (_POINTER, _INT64, _INT64, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT),
    "taco_nucleus": (_POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _POINTER, _INT),
    "taco_sum_exp": (_POINTER, _INT64, _INT64, _POINTER, _INT),
    "taco_draw": (_POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _INT),
    "taco_draw_kept": (_POINTER, _INT64, _INT64, *(_POINTER,) * 6, _INT),
    "taco_draw_near": (_POINTER, _INT64, _INT64, *(_POINTER,) * 7, _INT),
    "taco_mask": (_POINTER, _INT64, _INT64, _POINTER, _INT64, _POINTER, _INT64, _INT),
    "taco_draw_allowed": (_POINTER, _INT64, _POINTER, _POINTER, _INT64, _INT64, *(_POINTER,) * 6, _INT),
    "taco_uniform": (_POINTER, _POINTER, ctypes.c_uint32, _INT64, _POINTER),
    "taco_with_idle_team": (WORK, _INT),
    "taco_decoder_layer": (
        *(_INT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
        *(_INT, _POINTER, _POINTER, _INT64, _POINTER, _POINTER),
    ),
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library with its instruction set, or None with the reason."""
    wanted = envs.native_kernels()
    if wanted == "0":
        return None, "TACO_NATIVE_KERNELS=0 is set"
    folder = Path(__file__).parent
    paths = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_library{suffix}").exists()]
    if not paths:
        return None, "the library was not built when taco was installed (a C compiler is needed then)"
    try:
        library = ctypes.CDLL(str(paths[0]))
    except OSError as error:
        return None, f"the library cannot be loaded ({error})"
    library.taco_choose.restype = ctypes.c_char_p
    name = library.taco_choose(wanted.encode() if wanted else None)
    if name is None and wanted:
        raise TacoValidationError(
            f"The environment variable TACO_NATIVE_KERNELS is {wanted!r}, which this processor does not support or "
            'which does not exist; there are "amx", "avx512_bf16", "avx512" and "avx2", and "0" for none.',
            parameter="TACO_NATIVE_KERNELS",
            value=wanted,
        )
    if name is None:
        return None, "the processor has neither AVX2 with FMA nor AVX-512"
    sizes = (_INT64 * 4)()
    library.taco_sizes(sizes)
    same_sizes = list(sizes) == [ctypes.sizeof(structure) for structure in (Weight, Layer, Batch, Scratch)]
    if not same_sizes or not all(hasattr(library, function) for function in _ARGUMENTS):
        return None, "the library was built from other sources; install taco again"
    for function, arguments in _ARGUMENTS.items():
        getattr(library, function).argtypes = arguments
        getattr(library, function).restype = None
    library.taco_attention_scratch.argtypes = (_INT, _INT64, _INT64)
    library.taco_attention_scratch.restype = _INT64
    return library, name.decode()


def library() -> ctypes.CDLL | None:
    """The loaded library, or None where there is none."""
    return _load()[0]


def instruction_set() -> str | None:
    """Name of the instruction set in use ("amx", "avx512_bf16", "avx512", "avx2"), or None without the library."""
    loaded, text = _load()
    return None if loaded is None else text


def instruction_sets() -> list[str]:
    """Instruction sets that the processor has, the best first; none without the library."""
    loaded, best = _load()
    if loaded is None:
        return []
    names = [name for name in ("amx", "avx512_bf16", "avx512", "avx2") if loaded.taco_choose(name.encode())]
    loaded.taco_choose(best.encode())
    return names


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Within this context the library uses the instruction set of this name (for tests and benchmarks)."""
    loaded, best = _load()
    assert loaded is not None and loaded.taco_choose(name.encode()), name
    try:
        yield
    finally:
        loaded.taco_choose(best.encode())


def why_missing() -> str | None:
    """Why the library is not used, or None if it is."""
    loaded, text = _load()
    return text if loaded is None else None


def with_idle_team(work: Callable[[], T]) -> T:
    """Calls a function that has threads of its own, while the OpenMP threads sleep.

    Else they wait for their next work in a busy loop, for some milliseconds, and take the cores from the others.
    """
    loaded = library()
    num_threads = torch.get_num_threads()
    if loaded is None or num_threads == 1:
        return work()
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:  # an exception cannot pass through C
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    loaded.taco_with_idle_team(WORK(call), num_threads)
    if errors:
        raise errors[0]
    if not results:  # it came between C and the first line of `call`, where ctypes drops what is raised
        raise KeyboardInterrupt
    return results[0]


def packs(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype on a CPU are multiplied by the library."""
    return library() is not None and dtype in TYPES
