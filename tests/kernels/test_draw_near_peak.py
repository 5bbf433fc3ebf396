"""Draws of filtered rows in one pass, which only the native kernel has; elsewhere the filters' own way is taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from taco.kernels import native
from taco.kernels.sampling import draw_near_peak
from tests.kernels.test_sampling import random_logits, uniforms

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels here")

NEAR = 10  # nats below the peak in which the native kernel lists tokens, and how many at most
NEAR_ROOM = 8192


def left_by_definition(row: np.ndarray, top_k: int, top_p: float, log_min_p: float) -> np.ndarray:
    """Ids of the tokens that the filters leave, ascending."""
    order = np.argsort(-row, kind="stable")
    ranked = row[order].astype(np.float64)
    weights = np.exp(ranked - ranked[0])
    if top_k:
        weights[ranked < ranked[top_k - 1]] = 0
    before = weights.cumsum() - weights
    kept = (weights > 0) & ((before < top_p * weights.sum()) | (top_p == 1))
    return np.sort(order[kept & (row[order] >= row[order[0]] + np.float32(log_min_p))])


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([1, 2, 17, 300, 1023, 5000, 20000]),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    step=st.sampled_from([0.0, 0.0, 0.5, 8.0]),
    top_k=st.one_of(st.just(0), st.integers(1, 400)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.9999)),
    min_p=st.one_of(st.just(0.0), st.floats(1e-6, 1.0)),
    number=st.one_of(st.just(0.0), st.just(1 - 2**-53), st.floats(0, 1, exclude_max=True)),
)
def test_draws_near_the_peak_are_from_what_the_filters_leave(
    seed: int, vocab: int, scale: float, step: float, top_k: int, top_p: float, min_p: float, number: float
) -> None:
    top_k = top_k if top_k < vocab else 0
    assume(top_k or top_p < 1 or min_p)
    logits = random_logits(3, vocab, seed, step) * scale
    before = logits.clone()
    log_min_p = np.float32(np.log(min_p)) if min_p else np.float32(-np.inf)
    places = np.array([2, 0])
    limits = np.array([top_k] * 2), np.array([top_p] * 2), np.array([log_min_p] * 2)
    drawn = draw_near_peak(logits, places, logits.amax(-1)[places], *limits, uniforms(number, number))
    assert drawn is not None and torch.equal(logits, before)
    for row, token_id in zip(logits.numpy()[places], drawn.tolist(), strict=True):
        left, more, less = (
            left_by_definition(row, top_k, min(1.0, top_p + change) if top_p < 1 else 1.0, log_min_p)
            for change in (0, 1e-6, -1e-6)
        )
        if token_id < 0:
            num_near = (row >= row.max() - NEAR).sum()
            is_far = row[more].min() < row.max() - NEAR + 1e-3 or (top_p == 1 and not top_k and log_min_p < 1e-3 - NEAR)
            assert is_far or num_near > NEAR_ROOM or top_k > num_near
            continue
        assert token_id in more
        if not np.array_equal(less, more):
            continue  # it depends on the rounding of sums what is left
        mass = np.exp(row[left].astype(np.float64) - row.max()).cumsum()
        place = left.tolist().index(token_id)
        start = mass[place - 1] if place else 0.0
        assert start - 1e-6 * mass[-1] <= number * mass[-1] <= mass[place] + 1e-6 * mass[-1]


@pytest.mark.parametrize("step", [1 / 5000, 1 / 70, 0.0625])
def test_the_least_likely_token_that_is_left_can_be_drawn_near_the_peak(step: float) -> None:
    logits = -step * torch.arange(600, dtype=torch.float32)[None]  # so the last one that is left is the least likely
    cases = [(k, 1.0, -np.inf) for k in (1, 2, 3, 7, 50, 90, 150)]
    cases += [(0, p, -np.inf) for p in (0.01, 0.1, 0.3, 0.6, 0.66)]
    cases += [(0, 1.0, -step * (number + 0.5)) for number in (0, 1, 5, 99)]
    cases += [(50, 0.3, -np.inf), (50, 0.99, -step * 10.5), (9, 0.999, -step * 40.5), (100, 0.2, -step * 70.5)]
    for top_k, top_p, log_min_p in cases:
        limits = np.array([top_k]), np.array([top_p]), np.array([log_min_p], np.float32)
        left = left_by_definition(logits[0].numpy(), top_k, top_p, log_min_p)
        assert len(left) < 600
        for number, expected in ((0.0, 0), (1 - 2**-53, left[-1])):
            drawn = draw_near_peak(logits, np.array([0]), logits.amax(-1), *limits, uniforms(number))
            assert drawn is not None and drawn.tolist() == [expected], (top_k, top_p, log_min_p)


def test_what_lies_far_below_the_peak_is_left_to_others() -> None:
    logits = torch.full((1, 30_000), -NEAR - 0.5)
    logits[0, 77] = 0
    for top_k, top_p, log_min_p, expected in (
        (0, 1.0, -NEAR - 1.0, -1),  # 0.45 of the probability is below
        (2, 1.0, -np.inf, -1),
        (0, 0.7, -np.inf, -1),
        (0, 0.5, -np.inf, 77),
        (1, 1.0, -np.inf, 77),
        (1, 0.7, -NEAR - 1.0, 77),
        (0, 1.0, -1.0, 77),
    ):
        limits = np.array([top_k]), np.array([top_p]), np.array([log_min_p], np.float32)
        drawn = draw_near_peak(logits, np.array([0]), logits.amax(-1), *limits, uniforms(0.9))
        assert drawn is not None and drawn.tolist() == [expected], (top_k, top_p, log_min_p)


def test_of_texts_no_more_is_left_than_is_near_the_peak() -> None:
    # By Zipf's law, with an exponent of 1.5, the nucleus of 0.95 ends some 9 nats below the peak.
    ranks = torch.stack([torch.randperm(49152, generator=torch.Generator().manual_seed(seed)) for seed in range(20)])
    logits = -1.5 * (1 + ranks.float()).log()
    limits = np.zeros(20, np.int64), np.full(20, 0.95), np.full(20, -np.inf, np.float32)
    numbers = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = draw_near_peak(logits, np.arange(20), logits.amax(-1), *limits, numbers)
    assert drawn is not None and (drawn >= 0).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_draws_near_the_peak_do_not_depend_on_the_rows_beside_them(threads: int) -> None:
    torch.set_num_threads(threads)
    logits = random_logits(40, 3001, seed=1)
    logits[7, 5], logits[8, 5], logits[9] = torch.nan, torch.inf, -torch.inf
    generator = np.random.default_rng(2)
    places = generator.permutation(40)[:33]
    peaks = logits[places].amax(-1)
    limits = [generator.integers(0, 60, 33), generator.uniform(0.1, 1, 33), np.log(generator.random(33, np.float32))]
    numbers = torch.from_numpy(generator.random(33))
    together = draw_near_peak(logits, places, peaks, *limits, numbers)
    assert together is not None and ((together >= -1) & (together < 3001)).all()
    for row in range(33):
        own = slice(row, row + 1)
        alone = draw_near_peak(
            logits[places[own]], np.array([0]), peaks[own], *(limit[own] for limit in limits), numbers[own]
        )
        assert alone is not None and alone[0] == together[row]


@pytest.mark.parametrize("name", native.instruction_sets())
def test_draws_near_the_peak_with_every_instruction_set(name: str) -> None:
    logits = random_logits(30, 5003, seed=4)
    limits = np.full(30, 50), np.full(30, 0.9), np.full(30, -np.inf, np.float32)
    numbers = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = (logits, np.arange(30), logits.amax(-1), *limits, numbers)
    expected = draw_near_peak(*arguments)
    with native.forced(name):
        found = draw_near_peak(*arguments)
    assert expected is not None and found is not None and torch.equal(found, expected)
