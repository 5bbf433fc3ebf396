"""Filling a model with weights: everything is checked first, then parameter after parameter is allocated and filled."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from taco.errors import TacoValidationError
from taco.models.loader.checkpoint import BlockCheckpoint, Checkpoint, TensorInfo, WeightEntry
from taco.models.loader.dummy import dummy_block, fill_dummy

# Tables that old versions of transformers saved with the weights; they are computed from the configuration.
ALWAYS_IGNORED = ("*rotary_emb.inv_freq",)
# Stored types that are no weights by themselves, but indexes, masks, or quantised weights with scales beside them.
NO_WEIGHTS = ("int", "uint", "bool", "float8", "complex")


def load_weights(
    model: nn.Module,
    entries: Sequence[WeightEntry],
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    ignore: Sequence[str] = (),
) -> None:
    """Allocate the parameters of a model and fill them from a checkpoint.

    The memory needed at the peak is that of the weights and of one tensor (of one block of rows where the checkpoint
    can hand out blocks). Buffers are not touched.

    Args:
        model: built on the meta device.
        entries: together they fill every parameter of the model exactly once.
        dtype: of all parameters; floating-point tensors of other types are cast.
        ignore: names (fnmatch patterns) of tensors in the checkpoint that the model does not want.

    Raises:
        TacoValidationError: before any memory is allocated, with all tensors that are missing, not expected, of a
            wrong shape, or not floating-point numbers.
    """
    places = parameter_places(model)
    _check_coverage(model, entries)
    infos = checkpoint.infos()
    names = {
        entry: next((name for name in (entry.name, *entry.aliases) if name in infos), entry.name) for entry in entries
    }
    _check_checkpoint(names, infos, [*ignore, *ALWAYS_IGNORED])

    by_param: dict[str, list[WeightEntry]] = defaultdict(list)
    for entry in entries:
        by_param[entry.param].append(entry)
    for param_name, param_entries in by_param.items():
        shape = model.get_parameter(param_name).shape
        param = torch.empty(shape, dtype=dtype, device=device)
        for entry in param_entries:
            target = target_of(param, entry)
            for start, block in _read_blocks(checkpoint, names[entry]):
                rows = target[start : start + len(block)] if target.dim() else target
                rows.copy_(block)
        replace_parameter(places, param_name, param)


def load_dummy_weights(model: nn.Module, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> None:
    """Allocate the parameters of a model and fill them with random values, which are the same on every device.

    Args:
        model: built on the meta device.
        dtype: of all parameters.
        seed: other seeds give other weights.
    """
    block = dummy_block(device=device, dtype=dtype, seed=seed)
    places = parameter_places(model)
    for name, old in list(model.named_parameters()):
        param = torch.empty(old.shape, dtype=dtype, device=device)
        fill_dummy(param, name, block)
        replace_parameter(places, name, param)


# Parameter name -> the modules and attributes where the parameter is; more than one for tied weights.
_Places = Mapping[str, Sequence[tuple[nn.Module, str]]]


def parameter_places(model: nn.Module) -> _Places:
    by_id: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    ids: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for attribute, param in module.named_parameters(recurse=False):
            by_id[id(param)].append((module, attribute))
            ids[f"{prefix}.{attribute}" if prefix else attribute] = id(param)
    return {name: by_id[param_id] for name, param_id in ids.items()}


def replace_parameter(places: _Places, name: str, values: torch.Tensor) -> None:
    param = nn.Parameter(values, requires_grad=False)
    for module, attribute in places[name]:
        setattr(module, attribute, param)


def target_of(param: torch.Tensor, entry: WeightEntry) -> torch.Tensor:
    """The part of a parameter that an entry fills, seen with the shape that the tensor has in the checkpoint."""
    if entry.dim is not None:
        param = param.narrow(entry.dim, entry.offset, _size(entry))
    return param.t() if entry.transpose else param


def _size(entry: WeightEntry) -> int:
    assert entry.dim is not None
    return (entry.shape[::-1] if entry.transpose else entry.shape)[entry.dim]


def _read_blocks(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    if isinstance(checkpoint, BlockCheckpoint):
        yield from checkpoint.read_blocks(name)
    else:
        yield 0, checkpoint.read(name)


def _check_coverage(model: nn.Module, entries: Sequence[WeightEntry]) -> None:
    """Assert that the entries, which the model itself made, fill each of its parameters exactly once."""
    params = {id(param): (name, param) for name, param in model.named_parameters()}
    ranges: dict[int, list[tuple[int | None, int, int]]] = defaultdict(list)
    for entry in entries:
        param = model.get_parameter(entry.param)
        assert param.is_meta, f"{entry.param} is not on the meta device"
        assert tuple(target_of(param, entry).shape) == tuple(entry.shape), (
            f"{entry.name} {entry.shape} does not fit into its part of {entry.param} {tuple(param.shape)}"
        )
        first, last = (0, 0) if entry.dim is None else (entry.offset, entry.offset + _size(entry))
        ranges[id(param)].append((entry.dim, first, last))
    for param_id, (name, param) in params.items():
        parts = sorted(ranges[param_id], key=lambda part: part[1])
        assert parts, f"no entry fills {name}"
        dims = {dim for dim, _, _ in parts}
        assert len(dims) == 1, f"the entries of {name} fill different dimensions"
        (dim,) = dims
        if dim is None:
            assert len(parts) == 1, f"several entries fill all of {name}"
            continue
        edges = [(first, last) for _, first, last in parts]
        assert [last for _, last in edges] == [*(first for first, _ in edges[1:]), param.shape[dim]], (
            f"the entries of {name} leave gaps or overlap: {edges} of {param.shape[dim]}"
        )
        assert edges[0][0] == 0, f"the entries of {name} leave a gap at its start: {edges}"


def _check_checkpoint(names: Mapping[WeightEntry, str], infos: Mapping[str, TensorInfo], ignore: Sequence[str]) -> None:
    missing = [name for name in names.values() if name not in infos]
    wanted = set(names.values())
    unexpected = [
        name for name in infos if name not in wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore)
    ]
    shapes: dict[str, str] = {}
    types: dict[str, str] = {}
    for entry, name in names.items():
        if name not in infos:
            continue
        if tuple(infos[name].shape) != tuple(entry.shape):
            shapes[name] = f"wanted {list(entry.shape)}, got {list(infos[name].shape)}"
        if infos[name].dtype.startswith(NO_WEIGHTS):
            types[name] = f"stored as {infos[name].dtype}"
    problems = [
        *_report("missing", dict.fromkeys(missing, "")),
        *_report("not expected", dict.fromkeys(unexpected, "")),
        *_report("of a wrong shape", shapes),
        *_report("not floating-point numbers (quantised checkpoints of this kind are not supported)", types),
    ]
    if problems:
        raise TacoValidationError(
            "The checkpoint does not fit the configuration of the model; nothing was loaded. "
            "Check that the weights and config.json belong together, and hf_overrides if you passed any.\n"
            + "\n".join(problems)
        )


def _report(what: str, notes: Mapping[str, str]) -> Iterable[str]:
    """Lines naming all tensors; those that differ in their (first) number only, the layer, share a line."""
    if not notes:
        return
    yield f"{len(notes)} {'tensor' if len(notes) == 1 else 'tensors'} {what}:"
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, note in notes.items():
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        if number is None:
            groups[name, note]
        else:
            groups[name[: number.start()] + "*" + name[number.end() :], note].append(int(number.group()))
    for (name, note), numbers in groups.items():
        shown = name.replace("*", f"[{_ranges(numbers)}]" if len(numbers) > 1 else str(numbers[0])) if numbers else name
        yield f"  {shown}{': ' if note else ''}{note}"


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as text: 0-3,7 for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
