"""GGUF files as checkpoints: names, orientation and values as Hugging Face has them.

The converter of llama.cpp (convert_hf_to_gguf.py) renames tensors and changes three kinds of them; all is undone here:
rows of the query and key projections of Llama are interleaved for its rotary embedding, the norm weights of Gemma are
stored as 1 + w, and the Conv1D weights of GPT-2 are transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from taco.errors import UnsupportedFeatureError
from taco.models.loader.checkpoint import TensorInfo, read_into, row_blocks
from taco.models.loader.gguf_config import CONFIG_TENSORS
from taco.models.loader.gguf_file import GGUFTensor
from taco.models.loader.source import gguf_header

_PLAIN_DTYPES = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.I64: torch.int64,
    GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I16: torch.int16,
    GGMLQuantizationType.I8: torch.int8,
}

# Elements that one thread dequantises at once.
_PIECE = 1 << 20
# gguf dequantises 16 rows at a time. With rows of this length the arrays are large enough to hide the cost of the
# calls and small enough for the cache (measured: up to 5 times faster than with the rows of a small model).
_ROW = 8192


@dataclass(frozen=True)
class _Names:
    """Names of one architecture: GGUF's to Hugging Face's, without the suffixes .weight and .bias."""

    top: Mapping[str, str]
    layer_prefix: str
    layer: Mapping[str, str]


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_LLAMA = _Names(_TOP, "model.layers", {**_ATTENTION, **_MLP, **_NORMS})
_NAMES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _Names(_TOP, "model.layers", {**_ATTENTION, **_QK_NORM, **_MLP, **_NORMS}),
    "gemma3_text": _Names(_TOP, "model.layers", {**_ATTENTION, **_QK_NORM, **_MLP, **_GEMMA_NORMS}),
    "phi3": _Names(
        _TOP,
        "model.layers",
        {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            **_NORMS,
        },
    ),
    "gpt2": _Names(
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        "transformer.h",
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
    ),
}

_Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Entry:
    tensor: GGUFTensor
    change: _Change | None  # what turns the tensor of the file into Hugging Face's
    transposed: bool


class GGUFCheckpoint:
    """A GGUF file.

    Args:
        path: the file.
        hf_config: configuration of the model, as `load_hf_config` returns it for the file.

    Raises:
        UnsupportedFeatureError: the architecture, or the type of a tensor, cannot be read.
    """

    def __init__(self, path: str, hf_config: Any) -> None:
        if hf_config.model_type not in _NAMES:
            raise UnsupportedFeatureError(
                f"{path}: GGUF files of the model type {hf_config.model_type!r} cannot be read; these can: "
                + ", ".join(sorted(_NAMES))
            )
        header = gguf_header(path)
        self._path = path
        self._entries: dict[str, _Entry] = {}
        for gguf_name, tensor in header.tensors.items():
            if gguf_name not in CONFIG_TENSORS:
                name = _hf_name(gguf_name, _NAMES[hf_config.model_type])
                self._entries[name] = _entry(name, tensor, hf_config)
        _check_types(path, {entry.tensor.type for entry in self._entries.values()})
        self._file = open(path, "rb", buffering=0)
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), "taco-dequantize")

    def infos(self) -> Mapping[str, TensorInfo]:
        infos = {}
        for name, entry in self._entries.items():
            shape = entry.tensor.shape[::-1] if entry.transposed else entry.tensor.shape
            plain = _PLAIN_DTYPES.get(entry.tensor.type)
            dtype = str(plain).removeprefix("torch.") if plain is not None else entry.tensor.type.name
            infos[name] = TensorInfo(shape, dtype)
        return infos

    def read(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        tensor = self._read_rows(entry.tensor, 0, entry.tensor.shape[0])
        return tensor if entry.change is None else entry.change(tensor)

    def read_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        entry = self._entries[name]
        if entry.change is not None:  # these are the small ones, and their rows depend on each other
            yield 0, self.read(name)
            return
        for start, stop in row_blocks(entry.tensor.shape, torch.float32.itemsize):
            yield start, self._read_rows(entry.tensor, start, stop)

    def close(self) -> None:
        self._pool.shutdown()
        self._file.close()

    def _read_rows(self, tensor: GGUFTensor, start: int, stop: int) -> torch.Tensor:
        plain = _PLAIN_DTYPES.get(tensor.type)
        out = torch.empty((stop - start, *tensor.shape[1:]), dtype=plain or torch.float32)
        row_bytes = tensor.num_bytes // tensor.shape[0]
        offset = tensor.offset + start * row_bytes
        if plain is not None:
            read_into(self._file.fileno(), memoryview(out.reshape(-1).view(torch.uint8).numpy()), offset, self._path)
            return out
        rows = out.view(stop - start, -1).numpy()
        step = max(1, _PIECE // rows.shape[1])
        pieces = [(rows[i : i + step], offset + i * row_bytes) for i in range(0, len(rows), step)]
        for _ in self._pool.map(partial(self._dequantize, tensor.type, row_bytes), pieces):
            pass  # raises what a piece raised
        return out

    def _dequantize(self, type_: GGMLQuantizationType, row_bytes: int, piece: tuple[np.ndarray, int]) -> None:
        rows, offset = piece
        raw = np.empty((len(rows), row_bytes), dtype=np.uint8)
        read_into(self._file.fileno(), memoryview(raw).cast("B"), offset, self._path)
        if rows.size % _ROW == 0:  # blocks never cross rows, so any number of whole blocks is as good as a row
            raw = raw.reshape(rows.size // _ROW, -1)
        rows[:] = quants.dequantize(raw, type_).reshape(rows.shape)


def _hf_name(gguf_name: str, names: _Names) -> str:
    """The Hugging Face name; a tensor that the architecture does not have keeps its name, to be found unexpected."""
    stem, _, suffix = gguf_name.rpartition(".")
    if stem in names.top:
        return f"{names.top[stem]}.{suffix}"
    block, _, rest = stem.partition(".")
    index, _, leaf = rest.partition(".")
    if block == "blk" and leaf in names.layer:
        return f"{names.layer_prefix}.{index}.{names.layer[leaf]}.{suffix}"
    return gguf_name


def _entry(name: str, tensor: GGUFTensor, hf_config: Any) -> _Entry:
    if hf_config.model_type in ("llama", "mistral"):
        if ".q_proj." in name:
            return _Entry(tensor, partial(_restore_rotary_rows, hf_config.num_attention_heads), transposed=False)
        if ".k_proj." in name:
            return _Entry(tensor, partial(_restore_rotary_rows, hf_config.num_key_value_heads), transposed=False)
    if hf_config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return _Entry(tensor, _subtract_one, transposed=False)
    if hf_config.model_type == "gpt2" and ".c_" in name and name.endswith(".weight"):
        return _Entry(tensor, torch.t, transposed=True)
    return _Entry(tensor, None, transposed=False)


def _restore_rotary_rows(num_heads: int, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of each head: from pairs (i, i + half) side by side to the first half, then the second half."""
    half = tensor.shape[0] // num_heads // 2
    return tensor.view(num_heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _subtract_one(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().sub_(1)


def _check_types(path: str, types: set[GGMLQuantizationType]) -> None:
    """Find out on one block of zeros whether gguf can dequantise a type."""
    unsupported = []
    for type_ in types - _PLAIN_DTYPES.keys():
        try:
            quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), dtype=np.uint8), type_)
        except NotImplementedError:
            unsupported.append(type_.name)
    if unsupported:
        raise UnsupportedFeatureError(
            f"{path} has tensors of type {', '.join(sorted(unsupported))}, which the installed gguf package cannot "
            "dequantise; use a file with another quantisation, e.g. Q4_K_M or Q8_0."
        )
