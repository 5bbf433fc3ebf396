"""Operations over rows of logits: the largest entries, the nucleus, and the draw of a token.

Rows are independent: on a CPU the result of a row is, bit for bit, the same whatever other rows share the call. For
that the code keeps to operations that treat each row alone (softmax, reductions and running sums along the last
dimension) and to elementwise ones whose result is exactly rounded.

Vocabularies are large and most of a row is never looked at twice: several operations first reduce the row to one number
a chunk, in one fast pass, and then work on the few chunks that matter.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from taco.kernels import native
from taco.kernels.dispatch import op

MAX_CHUNK = 128  # entries a chunk when looking for the largest entry
TOP_CHUNKING = 16  # entries a chunk when looking for the k largest
SUM_CHUNK = 256  # entries that are summed in float32 before float64 takes over
NATIVE_TOP = 256  # entries that the native search keeps in a list at most; beyond, sorting is faster
NUCLEUS_BUCKETS = 2048
NUCLEUS_BUCKETS_PER_NAT = 64.0
NUCLEUS_BLOCK = 1 << 19  # entries handled at a time, so that temporaries stay small


def places_where(flags: torch.Tensor, possible: np.ndarray | None = None) -> np.ndarray:
    """Places to look at, int64 [n], for what concerns those with a flag.

    On a CPU these are the places that have it. On another device reading flags would wait for it, and all places are
    looked at where one is possible; what was found for those without a flag is then passed over there.

    Args:
        flags: bool [N].
        possible: bool [N], false where no flag can be; None if they can be anywhere.
    """
    if flags.device.type == "cpu":
        return np.flatnonzero(flags.numpy())
    return np.arange(len(flags)) if possible is None else np.flatnonzero(possible)


@op
def max_token(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entry of each row and its index, the lowest among equals; NaN counts as the largest.

    Args:
        logits: float32 [N, vocab].

    Returns:
        values float32 [N] and ids int64 [N].
    """
    values, ids = logits.max(-1)
    return values, ids


def _native_rows(logits: torch.Tensor) -> ctypes.CDLL | None:
    """The native kernels, if they take these logits."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or not logits.is_contiguous():
        return None
    return native.library()


def _native_top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    library = _native_rows(logits)
    if library is None or k > NATIVE_TOP:
        return NotImplemented
    num_rows, vocab = logits.shape
    assert 1 <= k <= vocab, (k, vocab)
    values = torch.empty(num_rows, k, dtype=torch.float32)
    ids = torch.empty(num_rows, k, dtype=torch.int64)
    library.taco_top(logits.data_ptr(), num_rows, vocab, k, values.data_ptr(), ids.data_ptr(), torch.get_num_threads())
    return values, ids


@max_token.candidate("native")
def _max_token_native(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = _native_top(logits, 1)
    return found if found is NotImplemented else (found[0][:, 0], found[1][:, 0])


@max_token.candidate("cpu_chunks")
def _max_token_cpu(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # On a CPU a maximum without its index is an order of magnitude faster than one with it.
    num_rows, vocab = logits.shape
    if logits.device.type != "cpu" or vocab < 4 * MAX_CHUNK:
        return NotImplemented
    num_chunks = vocab // MAX_CHUNK
    whole = num_chunks * MAX_CHUNK
    peaks = logits[:, :whole].unflatten(1, (num_chunks, MAX_CHUNK)).amax(-1)
    if whole < vocab:
        peaks = torch.cat((peaks, logits[:, whole:].amax(-1, keepdim=True)), 1)
    chunks = peaks.max(-1).indices
    # A short last chunk is widened to the left: what it then shares with its neighbour is smaller than its maximum.
    starts = (chunks * MAX_CHUNK).clamp_(max=vocab - MAX_CHUNK)[:, None]
    values, offsets = logits.gather(1, starts + torch.arange(MAX_CHUNK)).max(-1)
    return values, starts[:, 0] + offsets


@op
def top_tokens(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of each row, descending. Which of several equal entries are among them is not specified.

    Args:
        logits: float32 [N, vocab].
        k: 1 to vocab.

    Returns:
        values float32 [N, k] and ids int64 [N, k].
    """
    values, ids = logits.topk(k)
    return values, ids


@top_tokens.candidate("native")
def _top_tokens_native(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _native_top(logits, k)


@top_tokens.candidate("cpu_chunks")
def _top_tokens_cpu(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    # The k largest entries lie in the k chunks with the largest maxima. Chunk i holds the entries i, i + num_chunks,
    # i + 2 * num_chunks, ...: maxima over that stride need no shuffling within SIMD registers.
    vocab = logits.shape[1]
    if logits.device.type != "cpu" or 2 * k * TOP_CHUNKING > vocab:
        return NotImplemented
    num_chunks = vocab // TOP_CHUNKING
    whole = num_chunks * TOP_CHUNKING
    grid = logits[:, :whole].unflatten(1, (TOP_CHUNKING, num_chunks))
    chunks = grid.amax(1).topk(k, sorted=False).indices  # [N, k]
    picked = grid.gather(2, chunks[:, None].expand(-1, TOP_CHUNKING, -1)).flatten(1)
    if whole < vocab:
        picked = torch.cat((picked, logits[:, whole:]), 1)
    values, places = picked.topk(k)
    lines = places // k
    ids = lines * num_chunks + chunks.gather(1, places - lines * k)
    return values, torch.where(lines < TOP_CHUNKING, ids, places + (whole - TOP_CHUNKING * k))


@op
def best_tokens(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of each row, descending; among equals the lowest ids, ascending.

    Args:
        scores: float32 [N, vocab].
        k: 1 to vocab.

    Returns:
        values float32 [N, k] and ids int64 [N, k].
    """
    vocab = scores.shape[1]
    if k == vocab:
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
        return values, ids
    values, ids = top_tokens(scores, k + 1)
    found = places_where(values[:, k] == values[:, k - 1])  # rows whose last place is contested
    values, ids = values[:, :k].contiguous(), ids[:, :k].contiguous()
    if len(found):
        cut = slice(None) if len(found) == len(ids) else torch.from_numpy(found)
        last = values[cut, -1:]
        num_above = (values[cut] > last).sum(-1, keepdim=True)
        # Ids are exact in float32 up to 2**24.
        falling = -torch.arange(vocab, dtype=torch.float32, device=scores.device)
        _, tied_ids = top_tokens(torch.where(scores[cut] == last, falling, -torch.inf), k)
        place = torch.arange(k, device=scores.device) - num_above
        ids[cut] = torch.where(place < 0, ids[cut], tied_ids.gather(1, place.clamp(min=0)))
    ids, by_id = ids.sort(-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


@best_tokens.candidate("native")
def _best_tokens_native(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _native_top(scores, k)


@op
def log_normalizers(
    logits: torch.Tensor, token_ids: torch.Tensor, or_equal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What makes log-probabilities of logits, and how one token of each row compares with the others.

    The log-probability of token t is (logits[t] - peak) - log_sum.

    Args:
        logits: float32 [N, vocab].
        token_ids: int64 [N], a token of each row.
        or_equal: whether tokens as likely as that one are counted.

    Returns:
        peak and log_sum, float32 [N], and how many log-probabilities are greater than that of the row's token (or
        equal), int64 [N].
    """
    peaks = logits.amax(-1, keepdim=True)
    log_sums = (logits - peaks).exp_().double().sum(-1, keepdim=True).log_().float()
    scores = (logits - peaks).sub_(log_sums)
    counts = count_above(scores, scores.gather(1, token_ids[:, None])[:, 0], or_equal)
    return peaks[:, 0], log_sums[:, 0], counts


@log_normalizers.candidate("native")
def _log_normalizers_native(
    logits: torch.Tensor, token_ids: torch.Tensor, or_equal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    library = _native_rows(logits)
    if library is None:
        return NotImplemented
    num_rows, vocab = logits.shape
    token_ids = token_ids.contiguous()
    peaks, log_sums = torch.empty(num_rows), torch.empty(num_rows)
    counts = torch.empty(num_rows, dtype=torch.int64)
    library.taco_score(
        logits.data_ptr(),
        num_rows,
        vocab,
        token_ids.data_ptr(),
        or_equal,
        peaks.data_ptr(),
        log_sums.data_ptr(),
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    return peaks, log_sums, counts


@op
def count_above(scores: torch.Tensor, values: torch.Tensor, or_equal: bool) -> torch.Tensor:
    """How many entries of each row are greater than the row's value (or equal, with `or_equal`), int64 [N].

    Args:
        scores: float32 [N, vocab].
        values: float32 [N].
    """
    values = values[:, None]
    return (scores >= values if or_equal else scores > values).sum(-1)


@count_above.candidate("cpu_numpy")
def _count_above_cpu(scores: torch.Tensor, values: torch.Tensor, or_equal: bool) -> torch.Tensor:
    if scores.device.type != "cpu":
        return NotImplemented
    compare = np.greater_equal if or_equal else np.greater
    return torch.from_numpy(np.count_nonzero(compare(scores.numpy(), values[:, None].numpy()), axis=-1))


@op
def nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest set of most likely tokens whose probability reaches `top_p`, at least one token.

    Of equal logits on the edge of the set only as many belong to it as are needed; by convention those with the lowest
    ids. (Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020.)

    Args:
        logits: float32 [N, vocab]; -inf has probability 0. The largest of each row must be finite.
        top_p: float64 [N], 0 < top_p <= 1.

    Returns:
        float32 [N], the smallest logit in the set, and int64 [N], how many tokens with exactly this logit belong to it,
        or `vocab` if all do.
    """
    values, _ = logits.sort(-1, descending=True)
    mass = values.softmax(-1).double().cumsum(-1)
    before = mass.roll(1, -1)
    before[:, 0] = 0
    return edge_of(values, (before < top_p[:, None] * mass[:, -1:]).sum(-1), logits.shape[1])


def edge_of(values: torch.Tensor, num_kept: torch.Tensor, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest of the first `num_kept` [N] of descending values [N, m], and how many of those equal it, or `vocab`
    if none equal to it comes after them."""
    edge = values.gather(1, num_kept[:, None] - 1)
    num_ties = num_kept - (values > edge).sum(-1)
    return edge[:, 0], num_ties.masked_fill_(num_kept == (values >= edge).sum(-1), vocab)


@nucleus.candidate("native")
def _nucleus_native(logits: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    library = _native_rows(logits)
    if library is None:
        return NotImplemented
    num_rows, vocab = logits.shape
    num_threads = torch.get_num_threads()
    top_p = top_p.contiguous()
    scratch = torch.empty(num_threads, vocab + 1)
    edges, num_ties = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
    library.taco_nucleus(
        logits.data_ptr(),
        num_rows,
        vocab,
        top_p.data_ptr(),
        scratch.data_ptr(),
        edges.data_ptr(),
        num_ties.data_ptr(),
        num_threads,
    )
    return edges, num_ties


@nucleus.candidate("cpu_histogram")
def _nucleus_cpu(logits: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Sorting a whole row costs more than all the rest of sampling. A histogram of the probability over the distance to
    # the largest logit finds the bucket in which the nucleus ends, and only that bucket is sorted.
    if logits.device.type != "cpu":
        return NotImplemented
    num_rows = max(1, NUCLEUS_BLOCK // logits.shape[1])
    parts = [_nucleus_histogram(*block) for block in zip(logits.split(num_rows), top_p.split(num_rows), strict=True)]
    return torch.cat([edge for edge, _ in parts]), torch.cat([ties for _, ties in parts])


def _nucleus_histogram(logits: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = len(logits)
    probs = logits.softmax(-1)
    distance = logits.amax(-1, keepdim=True) - logits
    buckets = distance.mul_(NUCLEUS_BUCKETS_PER_NAT).clamp_(max=NUCLEUS_BUCKETS - 1).to(torch.int64)
    mass = torch.zeros(num_rows, NUCLEUS_BUCKETS, dtype=torch.float64)
    mass = mass.scatter_add_(1, buckets, probs.double()).cumsum_(-1)
    wanted = top_p[:, None] * mass[:, -1:]
    last = torch.searchsorted(mass, wanted)  # the first bucket at whose end the wanted mass is reached
    rows, ids = np.divmod(np.flatnonzero(buckets.numpy() == last.numpy()), logits.shape[1])
    counts = np.bincount(rows, minlength=num_rows)
    places = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
    values = torch.full((num_rows, int(counts.max())), -torch.inf)
    weights = torch.zeros_like(values)
    values[rows, places] = logits[rows, ids]
    weights[rows, places] = probs[rows, ids]
    values, order = values.sort(-1, descending=True)
    inside = weights.gather(1, order).double().cumsum_(-1)
    before = inside.roll(1, -1)
    before[:, 0] = 0
    before += mass.gather(1, (last - 1).clamp(min=0)).masked_fill_(last == 0, 0)
    # Rounding may leave nothing; the first token of the bucket belongs to the set all the same.
    return edge_of(values, (before < wanted).sum(-1).clamp_(min=1), logits.shape[1])


@nucleus.candidate("bisection")
def _nucleus_bisection(logits: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # A GPU sums a row many times in the time of sorting it. The bits of a float, with those below the sign inverted
    # where it is set, are an integer that grows with it; so the edge is one of 2**32 integers.
    probs = logits.softmax(-1)

    def mass(kept: torch.Tensor) -> torch.Tensor:
        return torch.where(kept, probs, 0).sum(-1, dtype=torch.float64)

    def flip(bits: torch.Tensor) -> torch.Tensor:
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    peaks = logits.amax(-1)
    low = flip(torch.full_like(peaks, -torch.inf).view(torch.int32)).long()  # what is not below it has the mass wanted
    high = flip(peaks.view(torch.int32)).long() + 1  # and here no more
    wanted = top_p * mass(logits >= -torch.inf)
    for _ in range(32):
        middle = (low + high) >> 1
        reached = mass(logits >= flip(middle.int()).view(torch.float32)[:, None]) >= wanted
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    edges = flip(low.int()).view(torch.float32)
    equal = logits == edges[:, None]
    num_equal = equal.sum(-1)
    weight = torch.where(equal, probs, 0).amax(-1)
    num_ties = ((wanted - mass(logits > edges[:, None])) / weight).ceil_().long().clamp_(min=1)
    return edges, num_ties.masked_fill_(num_ties >= num_equal, logits.shape[1])


@op
def sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """The sum of exp(logit - largest logit) of each row, float64 [N]: 1 / the probability of the most likely token.

    Args:
        logits: float32 [N, vocab]; the largest of each row must be finite.
    """
    probs = logits.softmax(-1)
    return chunk_sums(probs).sum(-1) / probs.amax(-1)


@sum_exp.candidate("native")
def _sum_exp_native(logits: torch.Tensor) -> torch.Tensor:
    library = _native_rows(logits)
    if library is None:
        return NotImplemented
    num_rows, vocab = logits.shape
    sums = torch.empty(num_rows, dtype=torch.float64)
    library.taco_sum_exp(logits.data_ptr(), num_rows, vocab, sums.data_ptr(), torch.get_num_threads())
    return sums


@op
def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws one token of each row with the probabilities that the logits stand for, as `inverse_cdf`.

    Args:
        logits: float32 [N, vocab]; -inf has probability 0.
        uniforms: float64 [N] in [0, 1).

    Returns:
        int64 [N].
    """
    return inverse_cdf(logits.softmax(-1), uniforms)


@draw.candidate("native")
def _draw_native(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    library = _native_rows(logits)
    if library is None:
        return NotImplemented
    num_rows, vocab = logits.shape
    num_threads = torch.get_num_threads()
    uniforms = uniforms.contiguous()
    scratch = torch.empty(num_threads, vocab // SUM_CHUNK + 1, dtype=torch.float64)
    ids = torch.empty(num_rows, dtype=torch.int64)
    library.taco_draw(
        logits.data_ptr(), num_rows, vocab, uniforms.data_ptr(), scratch.data_ptr(), ids.data_ptr(), num_threads
    )
    return ids


@op
def draw_kept(
    logits: torch.Tensor, places: torch.Tensor, edges: torch.Tensor, num_ties: torch.Tensor, uniforms: torch.Tensor
) -> torch.Tensor:
    """As `draw`, for the rows at some places, from what `drop_below` leaves of them.

    Args:
        logits: float32 [N, vocab]; not changed.
        places: int64 [n].
        edges, num_ties: float32 [n] and int64 [n], of these rows.
        uniforms: float64 [n] in [0, 1).

    Returns:
        int64 [n].
    """
    survivors = logits[places]
    drop_below(survivors, edges, num_ties)
    return draw(survivors, uniforms)


@draw_kept.candidate("native")
def _draw_kept_native(
    logits: torch.Tensor, places: torch.Tensor, edges: torch.Tensor, num_ties: torch.Tensor, uniforms: torch.Tensor
) -> torch.Tensor:
    library = _native_rows(logits)
    if library is None:
        return NotImplemented
    vocab = logits.shape[1]
    num_threads = torch.get_num_threads()
    places, edges, num_ties, uniforms = (each.contiguous() for each in (places, edges, num_ties, uniforms))
    scratch = torch.empty(num_threads, vocab // SUM_CHUNK + 1, dtype=torch.float64)
    ids = torch.empty(len(places), dtype=torch.int64)
    library.taco_draw_kept(
        logits.data_ptr(),
        len(places),
        vocab,
        places.data_ptr(),
        edges.data_ptr(),
        num_ties.data_ptr(),
        uniforms.data_ptr(),
        scratch.data_ptr(),
        ids.data_ptr(),
        num_threads,
    )
    return ids


def draw_near_peak(
    logits: torch.Tensor,
    places: np.ndarray,
    peaks: torch.Tensor,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    uniforms: torch.Tensor,
) -> torch.Tensor | None:
    """As `draw`, for the rows at some places, from what filters leave of them, where those are tokens near the peak.

    First `top_k` leaves the k most likely tokens and those that tie with the k-th; then `top_p` the smallest set of
    most likely ones with this probability among them, of equal ones those with the lowest ids; then `min_p` those at
    least so many times as likely as the most likely. The native kernel does all of it in one pass over a row.

    Args:
        logits: float32 [N, vocab]; not changed.
        places: int64 [n].
        peaks: float32 [n], the largest logit of each of these rows. Where it is not finite the row gets some token.
        top_k: int64 [n], 0 for no limit, else less than vocab.
        top_p: float64 [n], 1 for no limit.
        min_p: float32 [n], its logarithm; -inf for no limit.
        uniforms: float64 [n] in [0, 1).

    Returns:
        int64 [n], with -1 for rows of which too many tokens may be left; None without the native kernel.
    """
    library = _native_rows(logits)
    if library is None:
        return None
    assert (places.dtype, top_k.dtype, top_p.dtype, min_p.dtype) == (np.int64, np.int64, np.float64, np.float32)
    assert all(each.flags.c_contiguous for each in (places, top_k, top_p, min_p))
    peaks, uniforms = peaks.contiguous(), uniforms.contiguous()
    ids = torch.empty(len(places), dtype=torch.int64)
    library.taco_draw_near(
        logits.data_ptr(),
        len(places),
        logits.shape[1],
        places.ctypes.data,
        peaks.data_ptr(),
        top_k.ctypes.data,
        top_p.ctypes.data,
        min_p.ctypes.data,
        uniforms.data_ptr(),
        ids.data_ptr(),
        torch.get_num_threads(),
    )
    return ids


def drop_below(logits: torch.Tensor, edges: torch.Tensor, num_ties: torch.Tensor) -> None:
    """Sets to -inf, in place, what is less than a row's edge, and of what equals it all but the lowest ids.

    Args:
        logits: float32 [N, vocab].
        edges: float32 [N].
        num_ties: int64 [N], how many of the logits equal to the edge stay; `vocab` stands for all.
    """
    logits.masked_fill_(logits < edges[:, None], -torch.inf)
    found = places_where(num_ties < logits.shape[1])
    if len(found) == len(logits):
        ties = logits == edges[:, None]
        logits.masked_fill_(ties & (ties.cumsum(-1, dtype=torch.int32) > num_ties[:, None]), -torch.inf)
    elif len(found):
        cut = torch.from_numpy(found)
        ties = logits[cut] == edges[cut, None]
        places, token_ids = (ties & (ties.cumsum(-1, dtype=torch.int32) > num_ties[cut, None])).nonzero(as_tuple=True)
        logits[cut[places], token_ids] = -torch.inf


def chunk_sums(weights: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive chunks of `SUM_CHUNK` entries of each row (the last may be shorter), float64 [N, chunks]."""
    vocab = weights.shape[1]
    num_chunks = vocab // SUM_CHUNK
    whole = num_chunks * SUM_CHUNK
    sums = weights[:, :whole].unflatten(1, (num_chunks, SUM_CHUNK)).sum(-1) if num_chunks else weights[:, :0]
    if whole < vocab:
        sums = torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True)), 1)
    return sums.double()


@op
def inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws one index of each row with probability proportional to its weight, by inversion of the running sum.

    The index is the first whose running sum, in index order, exceeds `uniform * total`; so it never has weight 0. The
    running sum has two levels: over chunks of `SUM_CHUNK` entries (summed in float32, added up in float64), then, in
    float64, over the entries of the one chunk that is hit.

    Args:
        weights: float32 or float64 [N, vocab], not negative, of finite sum; need not be normalised.
        uniforms: float64 [N] in [0, 1).

    Returns:
        int64 [N]. A row without any positive weight or with NaN gets some index in range.
    """
    vocab = weights.shape[1]
    mass = chunk_sums(weights).cumsum_(-1)
    chunks, rest = _invert(mass, uniforms * mass[:, -1])
    ids = chunks * SUM_CHUNK + torch.arange(SUM_CHUNK, device=weights.device)
    inside = weights.gather(1, ids.clamp(max=vocab - 1)).masked_fill_(ids >= vocab, 0).double().cumsum_(-1)
    offsets, _ = _invert(inside, rest)
    return (chunks * SUM_CHUNK + offsets).clamp_(max=vocab - 1)[:, 0]


def _invert(mass: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first index [N, 1] at which running sums [N, K] exceed the targets [N], and by how much each target exceeds
    the sum before that index [N]. Targets that rounding brought up to the total are lowered to just below it."""
    total = mass[:, -1]
    targets = torch.minimum(targets, torch.nextafter(total, torch.zeros_like(total)))[:, None]
    index = torch.searchsorted(mass, targets, right=True).clamp_(max=mass.shape[1] - 1)
    before = mass.gather(1, (index - 1).clamp(min=0)).masked_fill_(index == 0, 0)
    return index, (targets - before)[:, 0]
