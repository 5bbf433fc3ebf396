from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import taco.kernels.attention as attention
import taco.kernels.cpu_attention as cpu_attention
import taco.kernels.sdpa_attention as sdpa_attention
from taco.kernels import native
from taco.kernels.attention import paged_attention, write_kv
from taco.kernels.metadata import AttentionMetadata, Workspace

NAMES = [name for name in paged_attention.names if name != "native" or native.library() is not None]


def make_batch(rows, *, block_size, num_heads, num_kv_heads, head_dim, dtype, seed=0):
    """A batch of (queries, keys) rows over a shuffled cache; unused slots hold large numbers."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rows = sorted(rows, key=lambda row: row[0] > 1)
    counts = [count for count, _ in rows]
    lens = np.array([num_keys for _, num_keys in rows], np.int32)
    num_blocks = -(-lens // block_size)
    ids = generator.permutation(np.arange(1, num_blocks.sum() + 4))
    tables = np.zeros((len(rows), num_blocks.max()), np.int32)
    slots = []
    for row, (count, num_keys) in enumerate(rows):
        tables[row, : num_blocks[row]] = ids[: num_blocks[row]]
        ids = ids[num_blocks[row] :]
        for position in range(num_keys - count, num_keys):
            slots.append(int(tables[row, position // block_size]) * block_size + position % block_size)
    query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    meta = AttentionMetadata(
        query_start=torch.from_numpy(query_start),
        seq_lens=torch.from_numpy(lens),
        block_tables=torch.from_numpy(tables),
        slot_mapping=torch.tensor(slots),
        query_start_cpu=query_start,
        seq_lens_cpu=lens,
        num_decode_rows=counts.count(1),
        block_size=block_size,
        workspace=Workspace("cpu"),
    )
    shape = (int(num_blocks.sum()) + 4, num_kv_heads, block_size, head_dim)
    cache = [torch.randn(shape).to(dtype) for _ in range(2)]
    num_tokens = int(query_start[-1])
    query = torch.randn(num_tokens, num_heads, head_dim).to(dtype)
    key, value = (torch.randn(num_tokens, num_kv_heads, head_dim).to(dtype) for _ in range(2))
    return query, key, value, *cache, meta


def dense_attention(query, keys, values, scale, window):
    """One row in float64, by the definition. keys and values: [num_keys, num_kv_heads, head_dim]."""
    query, keys, values = query.double(), keys.double(), values.double()
    group = query.shape[1] // keys.shape[1]
    out = torch.empty_like(query)
    context = len(keys) - len(query)
    for i in range(len(query)):
        first = 0 if window is None else max(0, context + i + 1 - window)
        for head in range(query.shape[1]):
            k, v = (x[first : context + i + 1, head // group] for x in (keys, values))
            out[i, head] = torch.softmax(k @ query[i, head] * scale, 0) @ v
    return out


batches = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 60)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    | st.tuples(st.just(1), st.integers(1, 70)),
    min_size=1,
    max_size=6,
)


@given(
    batches, st.sampled_from([None, 1, 5, 33]), st.sampled_from([(4, 4), (6, 2), (4, 1)]), st.sampled_from([2, 8, 16])
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_attended_as_by_the_definition(name, rows, window, heads, block_size):
    batch = make_batch(
        rows, block_size=block_size, num_heads=heads[0], num_kv_heads=heads[1], head_dim=8, dtype=torch.float32
    )
    _, _, _, key_cache, value_cache, meta = batch
    # Views of one fused projection, as in a model.
    fused = torch.randn(meta.num_tokens, heads[0] + 2 * heads[1], 8)
    query, key, value = fused.split([heads[0], heads[1], heads[1]], 1)
    write_kv(key, value, key_cache, value_cache, meta)
    with paged_attention.forced(name):
        out = paged_attention(query, key_cache, value_cache, meta, 0.3, window)
    for row in range(meta.num_rows):
        tokens = slice(int(meta.query_start_cpu[row]), int(meta.query_start_cpu[row + 1]))
        num_keys = int(meta.seq_lens_cpu[row])
        keys, values = (
            torch.stack([cache[meta.block_tables[row, p // block_size], :, p % block_size] for p in range(num_keys)])
            for cache in (key_cache, value_cache)
        )
        expected = dense_attention(query[tokens], keys, values, 0.3, window)
        torch.testing.assert_close(out[tokens].double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", write_kv.names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_go_to_their_slots_and_nowhere_else(name, dtype):
    query, key, value, key_cache, value_cache, meta = make_batch(
        [(1, 9), (5, 5), (3, 20)], block_size=4, num_heads=2, num_kv_heads=2, head_dim=8, dtype=dtype
    )
    before = key_cache.clone()
    with write_kv.forced(name):
        write_kv(key, value, key_cache, value_cache, meta)
    written = torch.zeros(key_cache.shape[0], 4, dtype=torch.bool)
    for token, slot in enumerate(meta.slot_mapping.tolist()):
        written[slot // 4, slot % 4] = True
        assert torch.equal(key_cache[slot // 4, :, slot % 4], key[token])
        assert torch.equal(value_cache[slot // 4, :, slot % 4], value[token])
    assert torch.equal(key_cache.transpose(1, 2)[~written], before.transpose(1, 2)[~written])


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_float32(name):
    rows = [(1, 100), (1, 7), (40, 90)]
    batch = make_batch(rows, block_size=16, num_heads=6, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    query, _, _, key_cache, value_cache, meta = batch
    with paged_attention.forced(name):
        out = paged_attention(query, key_cache, value_cache, meta, 0.125)
    exact = paged_attention.reference(query.float(), key_cache.float(), value_cache.float(), meta, 0.125)
    assert (out.float() - exact).abs().max() < 0.03


@pytest.mark.parametrize(
    ("name", "module", "limit"),
    [("cpu", cpu_attention, limit) for limit in ("GATHER_BYTES", "QUERY_SLICE", "SCORE_ELEMENTS")]
    + [("sdpa", sdpa_attention, limit) for limit in ("GATHER_BYTES", "QUERY_SLICE", "MASK_BYTES")],
)
def test_budgets_do_not_change_results(monkeypatch, name, module, limit):
    rows = [(1, n) for n in (3, 70, 20, 41, 8)] + [(30, 64), (17, 17), (9, 80)]
    query, _, _, key_cache, value_cache, meta = make_batch(
        rows, block_size=8, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32
    )
    with paged_attention.forced(name):
        usual = {window: paged_attention(query, key_cache, value_cache, meta, 0.2, window) for window in (None, 12)}
        monkeypatch.setattr(module, limit, 7)
        meta.cache.clear()
        for window, expected in usual.items():
            out = paged_attention(query, key_cache, value_cache, meta, 0.2, window)
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
            again = paged_attention(query, key_cache, value_cache, meta, 0.2, window)  # as the next layer would
            assert torch.equal(out, again)


@pytest.mark.parametrize("window", [None, 40])
def test_gathered_keys_and_masks_keep_to_their_budgets(monkeypatch, window):
    rows = [(1, int(n)) for n in np.linspace(3, 300, 40)] + [(200, 300), (60, 60), (7, 250), (5, 5)]
    query, _, _, key_cache, value_cache, meta = make_batch(
        rows, block_size=8, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32
    )
    sizes = []
    attend = F.scaled_dot_product_attention

    def watch(q, keys, values, *, attn_mask, scale):
        sizes.append((q.shape[0], keys.nbytes, values.nbytes, attn_mask.nbytes))
        return attend(q, keys, values, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(sdpa_attention, "GATHER_BYTES", 200_000)
    monkeypatch.setattr(sdpa_attention, "MASK_BYTES", 150_000)
    with paged_attention.forced("sdpa"):
        out = paged_attention(query, key_cache, value_cache, meta, 0.2, window)
    expected = paged_attention.reference(query, key_cache, value_cache, meta, 0.2, window)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    assert max(keys for _, keys, _, _ in sizes) <= 200_000 and max(mask for *_, mask in sizes) <= 150_000
    assert max(count for count, *_ in sizes) > 5  # rows share a call
    assert len(sizes) < 30


@pytest.mark.parametrize("name", ["sdpa"])
def test_attention_on_a_device_never_waits_for_it(monkeypatch, name):
    # Tensors on the meta device have no values: whatever would read one on the host raises.
    query, key, value, key_cache, value_cache, meta = make_batch(
        [(1, 9), (1, 70), (5, 5), (3, 20)], block_size=8, num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for field in ("query_start", "seq_lens", "block_tables", "slot_mapping"):
        setattr(meta, field, getattr(meta, field).to("meta"))
    tensors = [tensor.to("meta") for tensor in (query, key, value, key_cache, value_cache)]
    write_kv(*tensors[1:], meta)
    for window in (None, 4):
        with paged_attention.forced(name):
            assert paged_attention(tensors[0], *tensors[3:], meta, 0.2, window).shape == query.shape


@pytest.mark.parametrize("window", [None, 12])
def test_the_reference_keeps_its_scores_within_a_budget(monkeypatch, window):
    rows = [(1, 41), (30, 64), (17, 17)]
    query, _, _, key_cache, value_cache, meta = make_batch(
        rows, block_size=8, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32
    )
    whole = paged_attention.reference(query, key_cache, value_cache, meta, 0.2, window)
    budget = 4 * 4 * 64 * 7  # seven queries of the longest row
    sizes = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda scores, dim: (sizes.append(scores.nbytes), softmax(scores, dim))[1]
    )
    monkeypatch.setattr(attention, "SCORE_BYTES", budget)
    sliced = paged_attention.reference(query, key_cache, value_cache, meta, 0.2, window)
    torch.testing.assert_close(sliced, whole, atol=1e-6, rtol=1e-5)
    assert len(sizes) == 1 + 5 + 1 and max(sizes) == budget
    monkeypatch.setattr(attention, "SCORE_BYTES", 1)  # one query is taken however large it is
    torch.testing.assert_close(
        paged_attention.reference(query, key_cache, value_cache, meta, 0.2, window), whole, atol=1e-6, rtol=1e-5
    )


def test_a_miss_says_what_was_asked_and_what_was_tried():
    query, _, _, key_cache, value_cache, meta = make_batch(
        [(1, 4)], block_size=4, num_heads=2, num_kv_heads=2, head_dim=8, dtype=torch.float32
    )
    with (
        paged_attention.forced("cpu"),
        pytest.raises(NotImplementedError, match=r"paged_attention.*1, 2, 8.*cpu, sdpa, ref"),
    ):
        paged_attention(query.to("meta"), key_cache, value_cache, meta, 0.2)
