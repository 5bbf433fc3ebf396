"""What all layers have in common: they know the checkpoint names of their weights."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn


class DeclareWeight(Protocol):
    """Called by a layer for each checkpoint tensor it wants; the model turns the calls into entries for the loader."""

    def __call__(
        self,
        name: str,
        shape: tuple[int, ...],
        param: str,
        *,
        dim: int | None = None,
        offset: int = 0,
        transpose: bool = False,
    ) -> None:
        """
        Args:
            name: of the tensor in the checkpoint.
            shape: in the checkpoint.
            param: attribute of the layer that it fills, or of which it fills a slice.
            dim, offset: the slice starts at `offset` along `dim` and is as long as the tensor.
            transpose: whether the two dimensions are swapped on the way.
        """


class Module(nn.Module):
    """A part of a model.

    Attributes:
        native_form: what a native kernel has derived from the weights below, once it has; see `forget_forms`.
    """

    def __call__(self, *args: Any) -> Any:
        # That of nn.Module looks for hooks, which takes as long as a small operation; taco has none.
        return self.forward(*args)

    def forget_forms(self) -> None:
        """Drops what was derived from weights, which have changed."""
        self.__dict__.pop("native_form", None)


class Layer(Module):
    """A module with weights of its own. It is built on the meta device, then loaded, then finalised, then called."""

    def declare_weights(self, declare: DeclareWeight) -> None:
        """Calls `declare` for each tensor that the layer itself (not its children) wants from the checkpoint."""
        raise NotImplementedError

    def finalize(self) -> None:
        """Called after loading: brings the weights into the form that is fastest to compute with."""

    def reopen(self) -> None:
        """Undoes `finalize`, so that weights can be replaced one by one; `finalize` is called again afterwards."""


def as_parameter(weight: torch.Tensor) -> nn.Parameter:
    """The weight as a parameter that takes no part in differentiation."""
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def weight_parameter(*shape: int) -> nn.Parameter:
    """A parameter without values that takes no part in differentiation."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)
