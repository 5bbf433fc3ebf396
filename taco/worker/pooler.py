"""From hidden states to results: which vectors of a row count, what the head makes of them, and their activation.

The counterpart of the sampler. Where a result needs more of a row than its last token, the row's share is gathered here
over the steps that compute it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from taco.config import PoolerSettings
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader.opening import open_checkpoint
from taco.models.loader.source import ModelSource
from taco.plan import NewRow
from taco.pooling_params import PoolingParams
from taco.worker.transfer import to_device


@dataclass(frozen=True)
class Projection:
    """A linear layer that pooled vectors pass through (the Dense module of sentence-transformers).

    Args:
        weight: [N, K] float32.
        bias: [N] float32, or None.
        activation: of its result.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(F.linear(x, self.weight, self.bias))


_ACTIVATIONS = {"Identity": torch.nn.Identity(), "ReLU": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}


def load_projection(folder: str, device: torch.device) -> Projection:
    """Reads a Dense module of sentence-transformers.

    Raises:
        TacoValidationError: its files are missing or damaged, or its activation function is not implemented.
    """
    settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    name = str(settings.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    if name not in _ACTIVATIONS:
        raise UnsupportedFeatureError(
            f"The activation function {name} of {folder} is not implemented; there are {', '.join(_ACTIVATIONS)}.",
            parameter="model",
            value=name,
        )
    checkpoint = open_checkpoint(ModelSource("hf", folder), load_format="auto", hf_config=None)
    try:
        tensors = {name: checkpoint.read(name).to(device, torch.float32) for name in checkpoint.infos()}
    finally:
        checkpoint.close()
    if not {"linear.weight"} <= set(tensors) <= {"linear.weight", "linear.bias"}:
        raise TacoValidationError(f"{folder} should hold linear.weight and perhaps linear.bias, but has {[*tensors]}.")
    return Projection(tensors["linear.weight"], tensors.get("linear.bias"), _ACTIVATIONS[name])


class _Row:
    """What is known and gathered of a request; the input processor has filled in every field of `params`."""

    __slots__ = ("first", "params", "parts", "token_ids", "token_type_ids", "total")

    def __init__(self, new: NewRow) -> None:
        self.token_ids = new.token_ids
        self.token_type_ids = new.token_type_ids
        self.params: PoolingParams = new.params  # type: ignore[assignment]
        self.first: torch.Tensor | None = None  # [H], hidden state of the first token
        self.total: torch.Tensor | None = None  # [H] float32, sum of the hidden states so far
        self.parts: list[torch.Tensor] = []  # float32 results of the tokens so far


class Pooler:
    """Makes the results of the rows that a step has computed.

    Args:
        settings: of the model.
        compute_logits: the model's head, [N, hidden_size] -> float32 [N, num_logits].
        dtype: of what the head takes.
        projections: that embeddings pass through.
        slice_rows: vectors that pass through the head at a time.
    """

    def __init__(
        self,
        settings: PoolerSettings,
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
        projections: Sequence[Projection] = (),
        slice_rows: int = 1 << 16,
    ) -> None:
        self._settings = settings
        self._compute_logits = compute_logits
        self._dtype = dtype
        self._projections = projections
        self._slice_rows = slice_rows
        self._rows: dict[int, _Row] = {}

    def add(self, new: NewRow) -> None:
        """A request enters."""
        self._rows[new.row] = _Row(new)

    def remove(self, row: int) -> None:
        """A request leaves, finished or not; what was gathered of it is dropped."""
        del self._rows[row]

    def token_type_ids(self, rows: Sequence[int], counts: Sequence[int]) -> np.ndarray | None:
        """int64 [T], the types of the tokens of a step that computes whole prompts; None if all are 0."""
        given = [self._rows[row].token_type_ids for row in rows]
        if not any(given):
            return None
        return np.array(
            [type_id for types, count in zip(given, counts, strict=True) for type_id in types or [0] * count]
        )

    def pool(
        self,
        rows: Sequence[int],
        counts: Sequence[int],
        num_computed: Sequence[int],
        finished: Sequence[int],
        hidden: torch.Tensor,
    ) -> list[tuple[list[int], torch.Tensor]]:
        """Takes the hidden states of one step.

        Args:
            rows: numbers of the rows of the step, in the order of their tokens.
            counts: tokens of each row in this step.
            num_computed: tokens of each row that were computed before it.
            finished: positions in `rows` of those whose prompt is now complete.
            hidden: [T, hidden_size].

        Returns:
            Results in groups: indexes of `finished`, and float32 [number of them, ...], one result for each: [D], or
            [number of tokens, D].
        """
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        known = [self._rows[row] for row in rows]
        ends_now = set(finished)
        for index, row in enumerate(known):
            self._gather(row, hidden[starts[index] : starts[index + 1]], num_computed[index], index in ends_now)

        results: list[tuple[list[int], torch.Tensor]] = []
        # Rows of a batch that came with the same parameters share them.
        for _, found in groupby(enumerate(finished), key=lambda pair: id(known[pair[1]].params)):
            places, indexes = zip(*found, strict=True)
            params = known[indexes[0]].params
            if _is_token_task(params):
                results += [
                    ([place], self._token_result(known[i])[None]) for place, i in zip(places, indexes, strict=True)
                ]
                continue
            vectors = self._vectors([known[i] for i in indexes], [starts[i + 1] - 1 for i in indexes], hidden)
            results.append((list(places), self._finish(vectors, params)))
        return results

    def _gather(self, row: _Row, chunk: torch.Tensor, num_computed: int, ends: bool) -> None:
        """Takes from a row's hidden states of this step what is needed of them later."""
        if _is_token_task(row.params):
            part = self._finish(chunk, row.params)
            # What is kept until the end of a long prompt is kept in host memory.
            row.parts.append(part if ends and not row.parts else part.cpu())
        elif self._settings.seq_pooling_type == "MEAN":
            total = chunk.sum(0, dtype=torch.float32)
            row.total = total if row.total is None else row.total.add_(total)
        elif self._settings.seq_pooling_type == "CLS" and num_computed == 0:
            row.first = chunk[0] if ends else chunk[0].clone()

    def _vectors(self, rows: Sequence[_Row], last_tokens: list[int], hidden: torch.Tensor) -> torch.Tensor:
        """The pooled vectors of rows that end in this step, [N, hidden_size]."""
        if self._settings.seq_pooling_type == "LAST":
            return hidden.index_select(0, to_device(np.array(last_tokens), hidden.device))
        if self._settings.seq_pooling_type == "CLS":
            return torch.stack([row.first for row in rows])  # type: ignore[arg-type]
        totals = torch.stack([row.total for row in rows])  # type: ignore[arg-type]
        return totals / to_device(np.array([len(row.token_ids) for row in rows]), hidden.device)[:, None]

    def _finish(self, vectors: torch.Tensor, params: PoolingParams) -> torch.Tensor:
        """[N, hidden_size] -> float32 [N, D]: head and activation."""
        parts = [self._finish_slice(part, params) for part in vectors.split(self._slice_rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _finish_slice(self, vectors: torch.Tensor, params: PoolingParams) -> torch.Tensor:
        if params.task in ("embed", "token_embed"):
            result = vectors.float()
            for projection in self._projections:
                result = projection(result)
            if params.dimensions is not None:
                result = result[:, : params.dimensions]
            return F.normalize(result, dim=-1) if params.use_activation else result
        settings = self._settings
        result = self._compute_logits(vectors.to(self._dtype))
        if params.returned_token_ids is not None:
            result = result.index_select(1, to_device(np.array(params.returned_token_ids, np.int64), result.device))
        if settings.logit_mean is not None:
            result = result - settings.logit_mean
        if settings.logit_sigma is not None:
            result = result / settings.logit_sigma
        if not params.use_activation or settings.activation == "identity":
            return result
        return result.sigmoid() if settings.activation == "sigmoid" else result.softmax(-1)

    def _token_result(self, row: _Row) -> torch.Tensor:
        """The results of all tokens of a row, or of those that end a step."""
        data = row.parts[0] if len(row.parts) == 1 else torch.cat(row.parts)
        if self._settings.tok_pooling_type == "STEP" and row.params.step_tag_id is not None:
            ends = np.flatnonzero(np.array(row.token_ids) == row.params.step_tag_id)
            data = data.index_select(0, to_device(ends, data.device))
        return data


def _is_token_task(params: PoolingParams) -> bool:
    return params.task in ("token_embed", "token_classify")
