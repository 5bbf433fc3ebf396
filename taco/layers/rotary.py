"""Rotary position embedding: frequencies of a configuration, angles of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.kernels.metadata import AttentionMetadata
from taco.kernels.rotary import rotary
from taco.layers.base import Module

# Scalings that transformers computes from a configuration alone ("default" is none).
_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")


class RotaryEmbedding(Module):
    """The rotary embedding of one or several layers; layers with the same settings share one object.

    Angles are computed once a step and kept in the metadata of the step, so there is no table that grows with the
    longest position.

    Args:
        config: configuration of the model, in transformers' form.
        head_dim: dimensions of a head.
        layer_type: which settings of `config.rope_parameters` to use where it has several ("sliding_attention", ...).
        partial: whether the model may rotate a part of each head only (`partial_rotary_factor`).

    Raises:
        UnsupportedFeatureError: the configuration wants a scaling that is not implemented.
    """

    def __init__(self, config: Any, head_dim: int, *, layer_type: str | None = None, partial: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layer_type = layer_type
        settings: Mapping[str, Any] = config.rope_parameters
        if layer_type is not None:
            settings = settings[layer_type]
        self.settings = settings
        self.type = settings.get("rope_type", "default")
        if self.type not in _TYPES:
            raise UnsupportedFeatureError(
                f"rope_type={self.type!r} in this model's configuration is not implemented; "
                f"there are {', '.join(_TYPES)}.",
                parameter="model",
                value=self.type,
            )
        fraction = settings.get("partial_rotary_factor")
        fraction = 1.0 if fraction is None else fraction
        if fraction != 1.0 and not partial:
            raise UnsupportedFeatureError(
                f"partial_rotary_factor={fraction} in this model's configuration is not implemented for "
                f"{config.model_type}.",
                parameter="model",
                value=fraction,
            )
        self.size = int(head_dim * fraction)
        if not 0 < self.size <= head_dim - self.size % 2:  # dimensions rotate in pairs
            raise TacoValidationError(
                f"partial_rotary_factor={fraction} in this model's configuration makes {self.size} of {head_dim} "
                "dimensions rotate; there must be one at least, and all at most.",
                parameter="model",
                value=fraction,
            )

    @property
    def max_position(self) -> int:
        """Number of positions that the model is made for. Some scalings extend the configuration's."""
        factor = self.settings.get("factor")
        if self.type == "yarn" and factor:
            return int(self.settings["original_max_position_embeddings"] * factor)
        if self.type == "linear":
            return int(self.config.max_position_embeddings * factor)
        return int(self.config.max_position_embeddings)

    def finalize(self, device: torch.device, max_model_len: int) -> None:
        """Computes the frequencies.

        Args:
            max_model_len: length of the longest sequence. LongRoPE has one set of frequencies for short sequences and
                one for long ones. The keys in the cache cannot be rotated anew when a sequence outgrows the short set,
                and a sequence must not change with its neighbours, so one set serves all: the long one if there may be
                long sequences (transformers decides for each call).

        Raises:
            TacoValidationError: dynamic scaling, whose frequencies change with each token past the configuration's
                limit, would be needed.
        """
        if self.type == "dynamic" and max_model_len > self.max_position:
            raise TacoValidationError(
                f"max_model_len={max_model_len} is more than max_position_embeddings={self.max_position} of this "
                "model, whose dynamic rotary scaling beyond that would change keys that are already cached. "
                f"Set max_model_len to {self.max_position} or less.",
                parameter="max_model_len",
                value=max_model_len,
            )
        with torch.device("cpu"):
            if self.type == "default":
                exponents = torch.arange(0, self.size, 2, dtype=torch.float) / self.size
                frequencies, self.scaling = 1.0 / (self.settings["rope_theta"] ** exponents), 1.0
            else:
                from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

                # The argument `device` has a default value only from transformers 5.18 on.
                frequencies, self.scaling = ROPE_INIT_FUNCTIONS[self.type](
                    self.config,
                    device=torch.device("cpu"),
                    seq_len=max_model_len if self.type == "longrope" else None,
                    layer_type=self.layer_type,
                )
            # Negated first half: the sine is odd, so this gives the signs that the kernel wants; cosine is even.
            self.frequencies = torch.cat((-frequencies, frequencies)).to(device)

    def angles(
        self, positions: torch.Tensor, dtype: torch.dtype, meta: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines of this step's tokens, each [T, 1, R], as `rotary` takes them."""
        angles = meta.cache.get(self)
        if angles is None:
            phases = positions.view(-1, 1, 1).float() * self.frequencies
            cos, sin = phases.cos(), phases.sin()
            if self.scaling != 1.0:
                cos, sin = cos * self.scaling, sin * self.scaling
            angles = meta.cache[self] = (cos.to(dtype), sin.to(dtype))
        return angles

    def forward(self, x: torch.Tensor, positions: torch.Tensor, meta: AttentionMetadata) -> None:
        """Rotates x [T, N, D] in place; positions are int64 [T]."""
        cos, sin = self.angles(positions, x.dtype, meta)
        rotary(x, cos, sin)
