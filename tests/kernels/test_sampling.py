from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.kernels import native, sampling
from taco.kernels.sampling import (
    best_tokens,
    count_above,
    draw,
    draw_kept,
    drop_below,
    inverse_cdf,
    log_normalizers,
    max_token,
    nucleus,
    sum_exp,
    top_tokens,
)

# Multiples of the chunk sizes, numbers just beside them, and small ones.
VOCABS = [1, 7, 130, 256, 511, 512, 513, 4096, 5003, 12289]

# Without the native kernels there is no native nucleus.
NUCLEUS = [("native kernels", name) for name in nucleus.names]
NUCLEUS += [("torch operators", name) for name in nucleus.names if name != "native"]


@pytest.fixture(autouse=True, params=["native kernels", "torch operators"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the native CPU kernels, where there are any, and as without them."""
    if request.param == "torch operators":
        monkeypatch.setattr(native, "_load", lambda: (None, "switched off by the test"))
    elif native.library() is None:
        pytest.skip(native.why_missing() or "")


def random_logits(num_rows: int, vocab: int, seed: int, step: float = 0.0) -> torch.Tensor:
    """Normal logits; with `step`, rounded to its multiples, so that many are equal."""
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits / step).round() * step if step else logits


def by_likelihood(row: torch.Tensor) -> list[int]:
    return sorted(range(len(row)), key=lambda token_id: (-row[token_id].item(), token_id))


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("step", [0.0, 2.0])
def test_max_token_is_the_first_of_the_largest(vocab: int, step: float) -> None:
    logits = random_logits(5, vocab, seed=vocab, step=step)
    values, ids = max_token(logits)
    for row, value, token_id in zip(logits, values, ids, strict=True):
        assert (value, token_id) == (row.max(), row.tolist().index(row.max().item()))


@pytest.mark.parametrize("place", [0, 127, 128, 511, 600, 639, 640, 700])
def test_max_token_finds_a_peak_or_nan_at_any_place(place: int) -> None:
    logits = random_logits(3, 701, seed=1)
    logits[0, place] = 100.0
    logits[1, place] = torch.nan
    logits[2] = -torch.inf
    values, ids = max_token(logits)
    assert ids.tolist() == [place, place, 0]
    assert values[0] == 100 and values[1].isnan() and values[2] == -torch.inf


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("k", [1, 3, 50, 200])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_top_tokens_are_the_largest_and_name_their_places(vocab: int, k: int, step: float) -> None:
    k = min(k, vocab)
    logits = random_logits(4, vocab, seed=vocab + k, step=step)
    values, ids = top_tokens(logits, k)
    with top_tokens.forced("reference"):
        expected, _ = top_tokens(logits, k)
    assert torch.equal(values, expected)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("vocab", [4096, 4111])
def test_top_tokens_finds_peaks_at_the_ends(vocab: int) -> None:
    logits = random_logits(1, vocab, seed=1)
    peaks = [vocab - 1, vocab - 15, 0, vocab // 16, vocab // 16 - 1]
    logits[0, peaks] = torch.tensor([50.0, 49, 48, 47, 46])
    assert top_tokens(logits, 5)[1].tolist() == [peaks]


def test_the_chunked_candidates_answer_for_large_vocabularies() -> None:
    logits = random_logits(2, 5003, seed=0)
    for op, arguments in ((max_token, ()), (top_tokens, (50,))):
        with op.forced("cpu_chunks"):
            assert op(logits, *arguments) is not NotImplemented


@pytest.mark.parametrize("vocab", [1, 7, 513, 5003])
@pytest.mark.parametrize("k", [1, 2, 20, 600])
@pytest.mark.parametrize("step", [0.0, 0.5, 4.0])
def test_best_tokens_break_ties_by_the_lower_id(vocab: int, k: int, step: float) -> None:
    k = min(k, vocab)
    scores = random_logits(3, vocab, seed=k, step=step)
    scores[1, vocab // 3 :] = -torch.inf  # fewer finite scores than places
    values, ids = best_tokens(scores, k)
    for row, row_values, row_ids in zip(scores, values, ids, strict=True):
        assert row_ids.tolist() == by_likelihood(row)[:k]
        assert torch.equal(row_values, row[row_ids])


@pytest.mark.parametrize("name", count_above.names)
def test_count_above_counts_the_greater_or_also_the_equal(name: str) -> None:
    scores = random_logits(4, 301, seed=3, step=1.0)
    values = scores[:, 17].clone()
    with count_above.forced(name):
        greater, not_less = count_above(scores, values, False), count_above(scores, values, True)
    for row in range(4):
        assert greater[row] == sum(score > values[row] for score in scores[row])
        assert not_less[row] == sum(score >= values[row] for score in scores[row])
    assert (not_less > greater).all()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_log_normalizers_make_log_probabilities(vocab: int, step: float) -> None:
    logits = random_logits(6, vocab, seed=vocab, step=step)
    logits[1, vocab // 2 :] = -torch.inf
    logits[1, 0] = 3.0
    logits[2] += 1e4
    token_ids = torch.tensor([0, 0, vocab // 2, vocab - 1, vocab // 3, 0])
    expected = logits.double().log_softmax(-1)
    for or_equal in (False, True):
        peaks, log_sums, counts = log_normalizers(logits, token_ids, or_equal)
        scores = (logits - peaks[:, None]) - log_sums[:, None]
        torch.testing.assert_close(scores.double(), expected, atol=2e-6, rtol=1e-6)
        own = scores.gather(1, token_ids[:, None])
        assert torch.equal(counts, (scores >= own if or_equal else scores > own).sum(-1))
        alone = log_normalizers(logits[3:4], token_ids[3:4], or_equal)
        assert torch.equal(alone[1][0], log_sums[3]) and torch.equal(alone[2][0], counts[3])


@pytest.mark.parametrize("vocab", VOCABS)
def test_sum_exp_is_that_of_exact_sums(vocab: int) -> None:
    logits = random_logits(5, vocab, seed=vocab)
    logits[1, 1:] = -torch.inf
    logits[2] += 1e4
    sums = sum_exp(logits)
    expected = (logits.double() - logits.amax(-1, keepdim=True)).exp().sum(-1)
    torch.testing.assert_close(sums, expected, atol=0, rtol=1e-6)
    assert sums[1] == 1 and sum_exp(logits[3:4])[0] == sums[3]


def nucleus_by_definition(row: torch.Tensor, top_p: float) -> tuple[list[int], float]:
    """The tokens of the nucleus, and how far the decisions were from falling the other way."""
    weights = np.exp(row.double().numpy() - row.max().item())
    order = by_likelihood(row)
    before = (np.cumsum(weights[order]) - weights[order]) / weights.sum()
    kept = [token_id for token_id, mass in zip(order, before, strict=True) if mass < top_p]
    margin = np.abs(before - top_p).min()
    return kept, margin


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([2, 5, 64, 300, 2000]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0, 40.0]),
    step=st.sampled_from([0.0, 0.25, 1.0]),
    top_p=st.floats(1e-3, 0.9999),
)
@pytest.mark.parametrize(("kernels", "name"), NUCLEUS, indirect=["kernels"])
def test_nucleus_is_the_smallest_likely_set_that_reaches_top_p(
    name: str, seed: int, vocab: int, scale: float, step: float, top_p: float
) -> None:
    logits = random_logits(3, vocab, seed, step) * scale
    logits[1, : vocab // 2] = -torch.inf
    with nucleus.forced(name):
        edges, ties = nucleus(logits, torch.full((3,), top_p, dtype=torch.float64))
    for row, edge, num_ties in zip(logits, edges, ties, strict=True):
        kept, margin = nucleus_by_definition(row, top_p)
        if margin < 1e-6:
            continue  # float32 probabilities do not decide this one
        equal = (row == edge).nonzero().flatten().tolist()
        assert sorted(kept) == sorted((row > edge).nonzero().flatten().tolist() + equal[: int(num_ties)])
        assert (num_ties == vocab) == (set(equal) <= set(kept))


@pytest.mark.parametrize(("kernels", "name"), NUCLEUS, indirect=["kernels"])
def test_nucleus_ends_as_soon_as_top_p_is_reached_exactly(name: str) -> None:
    logits = torch.zeros(3, 4)
    logits[1:, 3] = -torch.inf
    with nucleus.forced(name):
        edges, ties = nucleus(logits, torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64))
    assert edges.tolist() == [0, 0, 0] and ties.tolist() == [2, 4, 4]


def test_nucleus_of_many_rows_goes_in_blocks() -> None:
    num_rows = 2 * sampling.NUCLEUS_BLOCK // 4096 + 3
    logits = random_logits(num_rows, 4096, seed=5)
    top_p = torch.linspace(0.05, 0.95, num_rows, dtype=torch.float64)
    edges, ties = nucleus(logits, top_p)
    with nucleus.forced("reference"):
        expected_edges, expected_ties = nucleus(logits, top_p)
    assert torch.equal(edges, expected_edges) and torch.equal(ties, expected_ties)


def uniforms(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("vocab", [1, 3, 255, 256, 257, 1000, 5003, 262144])
def test_inverse_cdf_agrees_with_exact_sums(vocab: int) -> None:
    weights = random_logits(40, vocab, seed=vocab).softmax(-1) if vocab < 10**5 else torch.rand(8, vocab) / vocab
    numbers = torch.rand(len(weights), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ids = inverse_cdf(weights, numbers)
    for row, number, token_id in zip(weights.double().numpy(), numbers.tolist(), ids.tolist(), strict=True):
        upto = np.cumsum(row)
        target = number * upto[-1]
        slack = 1e-6 * upto[-1]
        assert row[token_id] > 0
        assert upto[token_id] + slack > target
        assert upto[token_id] - row[token_id] - slack <= target


def test_inverse_cdf_runs_through_the_vocabulary_in_order() -> None:
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]])
    for number, token_id in ((0.0, 1), (0.4999, 1), (0.5, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)):
        assert inverse_cdf(weights, uniforms(number)).item() == token_id


@settings(deadline=None)
@given(
    places=st.lists(st.integers(0, 1299), min_size=1, max_size=6, unique=True),
    number=st.one_of(st.just(0.0), st.just(1 - 2**-53), st.floats(0, 1, exclude_max=True)),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 1000),
)
def test_inverse_cdf_never_draws_weight_zero(places: list[int], number: float, exponent: int, seed: int) -> None:
    weights = torch.zeros(1, 1300)
    generator = torch.Generator().manual_seed(seed)
    weights[0, places] = (torch.rand(len(places), generator=generator) + 1e-3) * 2.0**exponent
    weights[0, places[0]] = 1e-30
    assert inverse_cdf(weights, uniforms(number)).item() in places


def test_inverse_cdf_never_draws_weight_zero_where_float32_sums_are_rounded_up() -> None:
    weights = torch.zeros(300, 600)
    weights[:, [3, 70, 140]] = torch.rand(300, 3, generator=torch.Generator().manual_seed(0))
    assert (sampling.chunk_sums(weights)[:, 0] > weights.double().sum(-1)).any()
    ids = inverse_cdf(weights, torch.full((300,), 1 - 2**-53, dtype=torch.float64))
    assert (ids == 140).all()


def test_inverse_cdf_stays_in_range_without_any_weight() -> None:
    weights = torch.stack((torch.zeros(700), torch.full((700,), torch.nan)))
    ids = inverse_cdf(weights, uniforms(0.3, 0.3))
    assert ((ids >= 0) & (ids < 700)).all()


def test_inverse_cdf_draws_in_proportion_to_the_weights() -> None:
    """Evenly spaced numbers hit each index as often as its share, give or take one."""
    weights = random_logits(1, 600, seed=9).softmax(-1)
    count = 20_000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids = inverse_cdf(weights.expand(count, -1), numbers)
    hits = torch.bincount(ids, minlength=600)
    assert (hits - weights[0].double() * count).abs().max() <= 1.01
    assert (ids[1:] >= ids[:-1]).all()


@pytest.mark.parametrize("vocab", [600, 5003, 12289])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_does_not_depend_on_the_others_bit_for_bit(vocab: int, threads: int) -> None:
    logits = random_logits(9, vocab, seed=vocab)
    numbers = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    top_p = numbers.clamp(min=0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        probs = logits.softmax(-1)
        whole = (probs, sampling.chunk_sums(probs), *nucleus(logits, top_p), inverse_cdf(probs, numbers))
        for row in range(9):
            one = slice(row, row + 1)
            alone = logits[one].clone()
            alone_probs = alone.softmax(-1)
            parts = (
                alone_probs,
                sampling.chunk_sums(alone_probs),
                *nucleus(alone, top_p[one]),
                inverse_cdf(alone_probs, numbers[one]),
            )
            for together, single in zip(whole, parts, strict=True):
                assert torch.equal(together[one], single)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("vocab", [1, 3, 15, 16, 17, 255, 256, 257, 1000, 5003])
def test_draw_agrees_with_exact_sums(vocab: int) -> None:
    logits = random_logits(40, vocab, seed=vocab)
    logits[:20, vocab // 2 + 1 :] = -torch.inf
    numbers = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    numbers[:4] = uniforms(0.0, 1 - 2**-53, 0.5, 1e-300)
    ids = draw(logits, numbers)
    for row, number, token_id in zip(logits.double(), numbers.tolist(), ids.tolist(), strict=True):
        weights = (row - row.max()).exp()
        upto = weights.cumsum(0)
        target, slack = number * upto[-1], 1e-6 * upto[-1]
        assert weights[token_id] > 0
        assert upto[token_id] + slack > target >= upto[token_id] - weights[token_id] - slack
    for row in range(40):
        assert draw(logits[row : row + 1], numbers[row : row + 1]) == ids[row]


def test_draw_never_hits_what_is_ruled_out() -> None:
    logits = torch.full((3, 1000), -torch.inf)
    logits[0, 3] = logits[1, 999] = logits[2, 256] = 1.0
    for number in (0.0, 0.5, 1 - 2**-53):
        assert draw(logits, torch.full((3,), number, dtype=torch.float64)).tolist() == [3, 999, 256]


def test_draw_stays_in_range_for_meaningless_rows() -> None:
    logits = torch.stack((torch.full((700,), -torch.inf), torch.full((700,), torch.nan)))
    ids = draw(logits, uniforms(0.3, 0.3))
    assert ((ids >= 0) & (ids < 700)).all()


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([1, 17, 256, 300, 2000]),
    step=st.sampled_from([0.0, 1.0, 8.0]),
    number=st.one_of(st.just(0.0), st.just(1 - 2**-53), st.floats(0, 1, exclude_max=True)),
)
def test_draw_kept_draws_from_what_is_left(seed: int, vocab: int, step: float, number: float) -> None:
    logits = random_logits(6, vocab, seed, step)
    logits[1] = 0.5
    places = torch.tensor([4, 1, 0])
    edges = logits[places, vocab // 3]
    equal = (logits[places] == edges[:, None]).sum(-1)
    for num_ties in (torch.full((3,), vocab), (equal + 1) // 2):
        before = logits.clone()
        ids = draw_kept(logits, places, edges, num_ties, uniforms(number, number, number))
        assert torch.equal(logits, before)
        drop_below(survivors := logits[places], edges, num_ties)
        assert ids.tolist() == draw(survivors, uniforms(number, number, number)).tolist()
        for row, token_id, edge, count in zip(logits[places], ids.tolist(), edges, num_ties, strict=True):
            first = (row == edge).nonzero().flatten()[: int(count)].tolist()
            assert row[token_id] > edge or token_id in first
