"""Activation functions under the names that configurations use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from taco.errors import UnsupportedFeatureError
from taco.kernels import native
from taco.kernels.activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


# [..., N] -> [..., N]
_PLAIN: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
# [..., gate and up] -> [..., activation of the gate times up]
_GATED: dict[str, Activation] = {
    "gelu": gelu_and_mul,
    "gelu_fast": gelu_tanh_and_mul,
    "gelu_new": gelu_tanh_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
    "silu": silu_and_mul,
    "swish": silu_and_mul,
}


def native_activation(function: Activation) -> int | None:
    """Number of a gated activation function in the native kernels, None if they have it not."""
    names = {silu_and_mul: "silu", gelu_tanh_and_mul: "gelu_tanh"}
    return native.ACTIVATIONS.get(names.get(function, ""))


def get_activation(name: str, *, gated: bool = False) -> Activation:
    """The activation function that a configuration names.

    Args:
        gated: for fused gate and up projections [..., 2 I] -> [..., I] instead of [..., N] -> [..., N].

    Raises:
        UnsupportedFeatureError: it is not implemented.
    """
    functions = _GATED if gated else _PLAIN
    if name not in functions:
        kind = "gated activation" if gated else "activation"
        raise UnsupportedFeatureError(
            f"The {kind} {name!r} of this model's configuration is not implemented; there are {', '.join(functions)}.",
            parameter="model",
            value=name,
        )
    return functions[name]
