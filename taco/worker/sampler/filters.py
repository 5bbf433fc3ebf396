"""Temperature, and the filters that keep only likely tokens: top-k, then top-p, then min-p.

Each filter keeps the logits from some value upwards, so what a row's filters leave is described by two numbers: the
smallest logit that is kept, and how many of the tokens with exactly that logit are. Both follow, nearly always, from a
short list of the most likely tokens; whether the list was long enough is checked, and other rows are handled in full.

Where native kernels draw, none of that is needed to draw a token, but only to report what is left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from taco.kernels.sampling import draw_near_peak, edge_of, nucleus, places_where, sum_exp, top_tokens
from taco.plan import NewRow
from taco.sampling_params import SamplingType
from taco.worker.sampler.feature import Feature, Selection
from taco.worker.sampler.tables import RowArray, select_rows
from taco.worker.transfer import to_device

LIST_LENGTH = 128  # of a row without top_k
LISTED_TOP_K = 1024  # with a larger top_k, a list of so many tokens would be no shortcut
TIE_ROOM = 32  # places of a list beyond top_k, for tokens that tie with the k-th


class Temperature(Feature):
    """Divides the logits; greedy rows have none."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._temperature = RowArray(num_rows, np.float32, device)

    def add(self, new: NewRow) -> bool:
        if new.params.temperature == 1 or is_greedy(new):
            return False
        self._temperature.set(new.row, new.params.temperature)
        return True

    def apply(self, selection: Selection, logits: torch.Tensor) -> None:
        temperature = self._temperature.on_device(selection.rows)
        if len(temperature) < len(logits):
            # Dividing the other rows by 1 changes nothing and is cheaper than copying rows out and in.
            positions = to_device(selection.positions, logits.device)
            temperature = torch.ones(len(logits), device=logits.device).index_copy_(0, positions, temperature)
        logits.div_(temperature[:, None])


class Kept(NamedTuple):
    """What the filters leave of n rows: the tokens whose logit is greater than `edge`, and of those whose logit equals
    it the `num_ties` with the lowest ids.

    Args:
        edge: float32 [n].
        num_ties: int64 [n]; the size of the vocabulary stands for all.
        values: float32 [n, m]: the largest logits of each row, descending.
        token_ids: int64 [n, m]: their tokens.
        listed: bool [n], on the device: every token left, but for those of probability 0, is in the row's list.
    """

    edge: torch.Tensor
    num_ties: torch.Tensor
    values: torch.Tensor
    token_ids: torch.Tensor
    listed: torch.Tensor


class Filters(Feature):
    """`top_k`: the k most likely tokens and those that tie with the k-th; `top_p`: of these the smallest set of most
    likely ones with this probability; `min_p`: of these the ones at least min_p times as likely as the most likely
    (Nguyen et al., "Turning up the heat: min-p sampling", 2024)."""

    def __init__(self, vocab_size: int, num_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._top_k = RowArray(num_rows, np.int64, device)
        self._top_p = RowArray(num_rows, np.float64, device)
        self._log_min_p = RowArray(num_rows, np.float32, device)

    def add(self, new: NewRow) -> bool:
        params = new.params
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else 0
        if not top_k and params.top_p >= 1 and params.min_p <= 0:
            return False
        self._top_k.set(new.row, top_k)
        self._top_p.set(new.row, params.top_p)
        self._log_min_p.set(new.row, np.log(params.min_p) if params.min_p > 0 else -np.inf)
        return True

    def find(self, rows: np.ndarray, logits: torch.Tensor, peaks: torch.Tensor) -> Kept:
        """What is left of rows of logits.

        Args:
            rows: int64 [n], row numbers.
            logits: float32 [n, vocab], after the temperature; not changed.
            peaks: float32 [n], the largest logit of each row. Rows where it is not finite get a meaningless result.
        """
        device = logits.device
        top_k = self._top_k.host[rows]
        # Each row looks only at as much of the list as it would have alone.
        lengths = np.where((top_k > 0) & (top_k <= LISTED_TOP_K), top_k + TIE_ROOM, LIST_LENGTH)
        lengths = np.minimum(lengths, self._vocab_size)
        values, token_ids = top_tokens(logits, int(lengths.max()))
        kth = self._kth_largest(rows, logits, values)
        floor = torch.maximum(kth, peaks + self._log_min_p.on_device(rows))
        edge, num_ties = floor, torch.full_like(token_ids[:, 0], self._vocab_size)
        wants_nucleus = self._top_p.host[rows] < 1
        if not wants_nucleus.any():
            return Kept(edge, num_ties, values, token_ids, _is_closed(values, lengths, edge))

        # Probabilities relative to the peak's. In double precision, because the last bit of vectorised float32
        # exponentials depends on where in memory they stand.
        weights = (values.double() - peaks[:, None]).exp_().masked_fill_(values < kth[:, None], 0)
        mass = weights.cumsum_(-1)
        total = mass[:, -1].clone()  # of the tokens that top_k leaves
        with_nucleus = to_device(wants_nucleus, device) & torch.isfinite(peaks)
        listed = _is_closed(values, lengths, kth)
        unlisted = places_where(with_nucleus & ~listed, wants_nucleus)
        if len(unlisted):
            places = to_device(unlisted, device)
            sums = sum_exp(self._left_by_top_k(rows, logits, kth, unlisted))
            total[places] = torch.where(listed[places], total[places], sums)
        top_p = self._top_p.on_device(rows)
        before = mass.roll(1, -1)
        before[:, 0] = 0
        found, ties = edge_of(values, (before < (top_p * total)[:, None]).sum(-1).clamp_(min=1), self._vocab_size)
        inner = (found >= floor) & with_nucleus
        edge, num_ties = torch.where(inner, found, floor), torch.where(inner, ties, num_ties)
        listed = _is_closed(values, lengths, edge)
        unlisted = places_where(with_nucleus & ~listed, wants_nucleus)
        if len(unlisted):
            places = to_device(unlisted, device)
            found, ties = nucleus(self._left_by_top_k(rows, logits, kth, unlisted), top_p[places])
            inner = found >= floor[places]
            found = torch.where(inner, found, floor[places])
            edge[places] = torch.where(listed[places], edge[places], found)
            ties = torch.where(inner, ties, self._vocab_size)
            num_ties[places] = torch.where(listed[places], num_ties[places], ties)
        return Kept(edge, num_ties, values, token_ids, listed)

    def draw_near_peak(
        self, rows: np.ndarray, places: np.ndarray, logits: torch.Tensor, peaks: torch.Tensor, uniforms: torch.Tensor
    ) -> torch.Tensor | None:
        """As `taco.kernels.sampling.draw_near_peak`.

        Args:
            rows: int64 [n], row numbers.
            places: int64 [n], of their logits.
            logits: float32 [N, vocab].
            peaks, uniforms: of these rows.
        """
        limits = self._top_k.host[rows], self._top_p.host[rows], self._log_min_p.host[rows]
        return draw_near_peak(logits, places, peaks, *limits, uniforms)

    def _left_by_top_k(
        self, rows: np.ndarray, logits: torch.Tensor, kth: torch.Tensor, places: np.ndarray
    ) -> torch.Tensor:
        """Logits of some of the rows, those below the top_k-th at -inf; a copy, except where nothing changes."""
        chosen = select_rows(logits, places)
        if self._top_k.host[rows[places]].any():
            chosen = chosen.masked_fill(chosen < select_rows(kth, places)[:, None], -torch.inf)
        return chosen

    def _kth_largest(self, rows: np.ndarray, logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The top_k-th largest logit of each row, from the list where it is there; -inf without top_k."""
        k = self._top_k.on_device(rows)[:, None]
        kth = values.gather(1, (k - 1).clamp_(0, values.shape[1] - 1)).masked_fill_(k == 0, -torch.inf)[:, 0]
        beyond = np.flatnonzero(self._top_k.host[rows] > values.shape[1])
        if len(beyond):
            places = to_device(beyond, logits.device)
            best, _ = top_tokens(select_rows(logits, beyond), int(self._top_k.host[rows[beyond]].max()))
            kth[places] = best.gather(1, k[places] - 1)[:, 0]
        return kth


def _is_closed(values: torch.Tensor, lengths: np.ndarray, edge: torch.Tensor) -> torch.Tensor:
    """Whether the first `lengths` of descending values [n, m] hold every finite logit from `edge` upwards, bool [n]."""
    last = values.gather(1, to_device(lengths - 1, values.device)[:, None])[:, 0]
    return (last < edge) | (last == -torch.inf)


def is_greedy(new: NewRow) -> bool:
    return new.params.sampling_type == SamplingType.GREEDY
