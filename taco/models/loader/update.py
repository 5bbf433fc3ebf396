"""Replacing the weights of a model in use, tensor by tensor, as a trainer in the same process hands them over.

Loaded weights are merged and packed. A tensor that comes in reopens its layer, fills its slice, and the layer is
finalised again when a tensor of another layer comes. So tensors may come alone and in any order; tensors of one layer
that come together are unpacked and packed once.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from taco.errors import EngineAsleepError, TacoValidationError
from taco.layers.base import Layer, Module
from taco.layers.embedding import LMHead
from taco.models.loader.apply import ALWAYS_IGNORED, NO_WEIGHTS, parameter_places, replace_parameter, target_of
from taco.models.loader.checkpoint import WeightEntry

if TYPE_CHECKING:
    from taco.models.base import Model

Weights = Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Placement:
    """What a model was built from, where its weights are, and what it is finalised for.

    Args:
        config: of the constructor of the model.
        device, dtype: of the weights.
        max_model_len: as for `Model.finalize`.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    max_model_len: int | None = None


@torch.no_grad()
def update_weights(model: Model, weights: Weights) -> set[str]:
    """See `Model.load_weights`."""
    if isinstance(weights, Mapping):
        weights = list(weights.items())
    table = _entries_by_name(model)
    if isinstance(weights, Sequence):
        problems = [problem for name, tensor in weights if (problem := _problem(model, table, name, tensor))]
        if problems:
            raise TacoValidationError(
                "These weights do not fit the model; nothing was changed.\n" + "\n".join(problems), parameter="weights"
            )
    names: set[str] = set()
    assert model.placement is not None
    if next(model.parameters()).device.type not in ("meta", model.placement.device.type):
        raise EngineAsleepError('The weights are asleep; call wake_up(tags=["weights"]) first.')
    filler = _Filler(model, model.placement)
    try:
        for name, tensor in weights:
            if (problem := _problem(model, table, name, tensor)) is not None:
                raise TacoValidationError(
                    f"{problem}. The {len(names)} tensors that came before it were taken.", parameter="weights"
                )
            for entry in table.get(name, ()):
                filler.fill(entry, tensor)
                names.add(name)
    finally:
        filler.close()
    return names


def drop_weights(model: Model) -> None:
    """Gives the memory of all weights back; they are missing from then on. The model stays the same object."""
    placement, num_updates = model.placement, model.num_weight_updates
    assert placement is not None
    model.__dict__.clear()
    with torch.device("meta"):
        model.__init__(placement.config)  # type: ignore[misc]
    model.eval()
    model.placement, model.num_weight_updates = placement, num_updates + 1
    model.missing_weights = {entry.name for entry in model.weight_entries()}


def _entries_by_name(model: Model) -> dict[str, list[WeightEntry]]:
    table: dict[str, list[WeightEntry]] = defaultdict(list)
    for entry in model.weight_entries():
        for name in (entry.name, *entry.aliases):
            table[name].append(entry)
    return table


def _problem(model: Model, table: Mapping[str, Sequence[WeightEntry]], name: str, tensor: object) -> str | None:
    """What is wrong with a tensor, or None."""
    if name not in table:
        ignored = (*model.ignored_weights, *ALWAYS_IGNORED)
        if any(fnmatch.fnmatch(name, pattern) for pattern in ignored):
            return None
        return f"{name} is not among the weights of this model, which have names such as {next(iter(table))}"
    if not isinstance(tensor, torch.Tensor):
        return f"{name} is of type {type(tensor).__name__}, and a torch.Tensor is wanted"
    wanted = table[name][0].shape
    if tuple(tensor.shape) != tuple(wanted):
        return f"{name} has the shape {list(tensor.shape)}, and {list(wanted)} is wanted"
    if str(tensor.dtype).removeprefix("torch.").startswith(NO_WEIGHTS):
        return f"{name} is stored as {tensor.dtype}, and floating-point numbers of 16 bits or more are wanted"
    return None


class _Filler:
    """Fills the layers of a model; the last one that was filled is open until `close`."""

    def __init__(self, model: Model, placement: Placement) -> None:
        self._model = model
        self._placement = placement
        self._heads = {head.embedding: head for head in model.modules() if isinstance(head, LMHead) and head.tied}
        self._open: Layer | None = None
        self._places = parameter_places(model) if model.missing_weights else {}

    def fill(self, entry: WeightEntry, tensor: torch.Tensor) -> None:
        """Copies a tensor to its place."""
        model, placement = self._model, self._placement
        if not model.missing_weights:
            self._reopen(model.get_submodule(entry.param.rpartition(".")[0]))
        elif (empty := model.get_parameter(entry.param)).is_meta:
            values = torch.empty(empty.shape, dtype=placement.dtype, device=placement.device)
            replace_parameter(self._places, entry.param, values)
        tensor = tensor.to(placement.device)
        # In the dtype of the model first, as when weights are loaded; the open layer may have another one.
        target_of(model.get_parameter(entry.param), entry).copy_(tensor.to(placement.dtype))
        if model.missing_weights:
            model.missing_weights.discard(entry.name)
            if not model.missing_weights:
                model.finalize(placement.max_model_len)

    def _reopen(self, layer: nn.Module) -> None:
        layer = self._heads.get(layer, layer)  # they share a weight
        if layer is not self._open:
            self._finalize_open()
            layer.reopen()
            self._open = layer

    def _finalize_open(self) -> None:
        if self._open is not None:
            self._open.finalize()
            self._open = None

    def close(self) -> None:
        """Makes the model ready to compute again."""
        self._finalize_open()
        self._model.num_weight_updates += 1
        for module in self._model.modules():
            if isinstance(module, Module):
                module.forget_forms()
        self._model.expose_attributes()
