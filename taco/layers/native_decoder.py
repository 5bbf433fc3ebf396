"""A whole dense decoder layer in one call of the native CPU kernels.

Between the small operations of a layer a CPU loses more time than it works in them when rows are few. In one call the
threads meet at barriers instead, and scratch memory is bounded: tokens pass through the linear layers in chunks.
"""

from __future__ import annotations

from ctypes import byref

import torch

from taco.kernels import native
from taco.kernels.linear import PackedWeight
from taco.kernels.metadata import AttentionMetadata
from taco.kernels.native_attention import attention_scratch_bytes, native_batch
from taco.layers.activation import native_activation
from taco.layers.decoder import DecoderLayer, decoder_layer

# Tokens that pass through the linear layers together: as many as stay in the second cache, and fill the registers.
CHUNK = 240
CHUNK_AMX = 256


class _NativeLayer:
    """A layer as the library takes it. Norms are kept as float32 copies.

    Args:
        layer: after `finalize`; all its weights are packed.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        attention = layer.attention.attention
        self.weight = layer.attention.qkv.weight
        self.dtype = self.weight.dtype
        self.group = attention.num_heads // attention.num_kv_heads
        self._norms = {
            name: norm.weight.detach().float().contiguous()
            for name, norm in (
                ("input_norm", layer.input_norm),
                ("mlp_norm", layer.mlp_norm),
                ("attention_out_norm", layer.attention_out_norm),
                ("mlp_out_norm", layer.mlp_out_norm),
                ("qk_norm", layer.attention.qk_norm),
            )
            if norm is not None
        }
        self._linears = {
            "qkv": layer.attention.qkv,
            "output": layer.attention.output,
            "gate_up": layer.mlp.gate_up,
            "down": layer.mlp.down,
        }
        self.structure = native.Layer(
            **{name: linear.weight.structure(linear.bias) for name, linear in self._linears.items()},
            **{name: weight.data_ptr() for name, weight in self._norms.items()},
            hidden_size=layer.attention.qkv.in_features,
            intermediate_size=layer.mlp.down.in_features,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            window=attention.sliding_window or 0,
            activation=native_activation(layer.mlp.activation),
            eps=layer.input_norm.eps,
            qk_eps=layer.input_norm.eps if layer.attention.qk_norm is None else layer.attention.qk_norm.eps,
            scale=attention.scale,
        )
        # Elements of scratch memory: for each token of a chunk, and for each token.
        query_size = attention.num_heads * attention.head_dim
        inner = layer.mlp.down.in_features
        self.chunk_sizes = (layer.attention.qkv.in_features, 2 * inner, inner)
        self.token_sizes = (layer.attention.qkv.out_features, query_size)
        self.key = ("native layer", self.group, attention.head_dim, *self.chunk_sizes, *self.token_sizes)

    @staticmethod
    def supports(layer: DecoderLayer) -> bool:
        attention = layer.attention
        linears = (attention.qkv, attention.output, layer.mlp.gate_up, layer.mlp.down)
        return (
            all(isinstance(linear.weight, PackedWeight) for linear in linears)
            and native_activation(layer.mlp.activation) is not None
            and attention.attention.head_dim % 2 == 0
            and attention.rotary is not None
        )

    def scratch(self, meta: AttentionMetadata) -> native.Scratch:
        """The parts of the workspace; the same for all layers of these sizes in a step."""
        found = meta.cache.get(self.key)
        if found is None:
            chunk = min(CHUNK_AMX if native.instruction_set() == "amx" else CHUNK, meta.num_tokens)
            batch = native_batch(meta, self.group)
            size = torch.finfo(self.dtype).bits // 8
            normed, gate_up, activated = (_round_up(chunk * length * size) for length in self.chunk_sizes)
            heads, attended = (_round_up(meta.num_tokens * length * size) for length in self.token_sizes)
            parts = (
                ("normed", normed),
                ("heads", heads),
                ("attended", attended),
                ("gate_up", gate_up),
                ("activated", activated),
                ("attention", attention_scratch_bytes(self.dtype, self.structure.head_dim, batch)),
            )
            # A name of its own: layers of other sizes in the same step must not replace the buffer.
            buffer = meta.workspace.take(str(self.key), (sum(length for _, length in parts),), torch.uint8)
            address = buffer.data_ptr()
            found = meta.cache[self.key] = native.Scratch(chunk=chunk)
            for name, length in parts:
                setattr(found, name, address)
                address += length
        return found


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


@decoder_layer.candidate("native")
def decoder_layer_native(
    layer: DecoderLayer,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    positions: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
    meta: AttentionMetadata,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrites `x` and `residual` and returns them."""
    weight = layer.attention.qkv.weight
    form = layer.__dict__.get("native_form")
    if form is None or form.weight is not weight:
        if not isinstance(weight, PackedWeight) or not _NativeLayer.supports(layer):
            return NotImplemented
        form = layer.__dict__["native_form"] = _NativeLayer(layer)
    key_cache, value_cache = kv_cache
    if x.dtype != form.dtype or key_cache.dtype != form.dtype:
        return NotImplemented
    add_first = residual is not None
    if residual is None:
        residual, x = x.contiguous(), torch.empty_like(x)
    rotary = layer.attention.rotary
    cos, sin = rotary.angles(positions, x.dtype, meta)
    library = native.library()
    assert library is not None
    library.taco_decoder_layer(
        native.TYPES[x.dtype],
        byref(form.structure),
        byref(native_batch(meta, form.group).structure),
        byref(form.scratch(meta)),
        x.data_ptr(),
        residual.data_ptr(),
        add_first,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1],
        key_cache.data_ptr(),
        value_cache.data_ptr(),
    )
    return x, residual
