from __future__ import annotations

import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from taco.kernels import native, native_attention
from taco.kernels.attention import paged_attention
from taco.kernels.linear import PackedWeight, linear
from tests.kernels.test_attention import make_batch

needs_library = pytest.mark.skipif(native.library() is None, reason="no native kernels here")
ROWS = [(1, 1), (1, 63), (1, 64), (1, 65), (1, 200), (3, 3), (70, 90), (130, 130)]
WINDOWS = [None, 1, 20, 64, 100]
DTYPES = [torch.float32, torch.bfloat16]


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=120
    )


def test_the_library_is_there_where_there_is_a_compiler() -> None:
    """Sources that do not compile do not stop the installation, and without the library its tests are skipped."""
    if sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("gcc"):
        reason = native.why_missing()
        assert reason is None or reason.startswith(("TACO_NATIVE_KERNELS=0", "the processor"))


def test_the_library_can_be_switched_off() -> None:
    code = "from taco.kernels import native; print(native.library(), native.why_missing())"
    assert run(code, TACO_NATIVE_KERNELS="0").stdout == "None TACO_NATIVE_KERNELS=0 is set\n"


def test_an_unknown_instruction_set_is_an_error() -> None:
    if native.library() is None:
        pytest.skip(native.why_missing() or "")
    result = run("from taco.kernels import native; native.library()", TACO_NATIVE_KERNELS="mmx")
    assert "TACO_NATIVE_KERNELS is 'mmx'" in result.stderr


def attend(batch, window, name):
    query, _, _, key_cache, value_cache, meta = batch
    meta.cache.clear()
    with paged_attention.forced(name):
        return paged_attention(query, key_cache, value_cache, meta, 0.3, window)


@needs_library
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_multiplies(instruction_set: str, dtype: torch.dtype) -> None:
    for rows, inner, outer in [(1, 2, 1), (5, 34, 33), (13, 64, 100), (250, 66, 70)]:
        x, weight = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
        with native.forced(instruction_set):
            out = linear(x, PackedWeight.pack(weight), None, torch.float32)
        torch.testing.assert_close(out, x.float() @ weight.float().T, atol=1e-4, rtol=1e-5)


@needs_library
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 16), ((9, 3), 64), ((8, 1), 80), ((70, 1), 6), ((4, 2), 256)])
def test_every_instruction_set_attends(instruction_set, dtype, heads, head_dim) -> None:
    batch = make_batch(ROWS, block_size=16, num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, dtype=dtype)
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    for window in WINDOWS:
        with native.forced(instruction_set):
            out = attend(batch, window, "native")
        torch.testing.assert_close(out, attend(batch, window, "reference"), **tolerance)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_attention_of_a_query_has_the_same_bits_in_any_batch_and_any_chunk(dtype, window) -> None:
    query, _, _, key_cache, value_cache, meta = make_batch(
        ROWS, block_size=16, num_heads=6, num_kv_heads=2, head_dim=32, dtype=dtype
    )
    together = attend((query, None, None, key_cache, value_cache, meta), window, "native")
    starts, lens, tables = meta.query_start_cpu, meta.seq_lens_cpu, meta.block_tables.numpy()
    for row in range(len(lens)):
        count = int(starts[row + 1] - starts[row])
        for first, last in {(0, count), (0, 1), (count // 2, count), (count - 1, count)}:
            alone = type(meta)(
                query_start=torch.tensor([0, last - first], dtype=torch.int32),
                seq_lens=torch.tensor([lens[row] - count + last], dtype=torch.int32),
                block_tables=torch.from_numpy(np.ascontiguousarray(tables[row : row + 1])),
                slot_mapping=torch.zeros(last - first, dtype=torch.int64),
                query_start_cpu=np.array([0, last - first], np.int32),
                seq_lens_cpu=np.array([lens[row] - count + last], np.int32),
                num_decode_rows=int(last - first == 1),
                block_size=meta.block_size,
                workspace=meta.workspace,
            )
            part = slice(int(starts[row]) + first, int(starts[row]) + last)
            out = attend((query[part], None, None, key_cache, value_cache, alone), window, "native")
            assert torch.equal(out, together[part]), (row, first, last)


def share_prefixes(batch, shared_blocks):
    """Rows get the first blocks of the row before them, as many as `shared_blocks` says."""
    meta = batch[-1]
    tables = meta.block_tables.numpy()
    for row, num_blocks in enumerate(shared_blocks, start=1):
        tables[row, :num_blocks] = tables[row - 1, :num_blocks]
    meta.cache.clear()
    return batch


def row_alone(meta, row):
    """The metadata of a decoding row in a batch of its own."""
    lens = meta.seq_lens_cpu[row : row + 1]
    return type(meta)(
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.from_numpy(lens),
        block_tables=torch.from_numpy(np.ascontiguousarray(meta.block_tables.numpy()[row : row + 1])),
        slot_mapping=torch.zeros(1, dtype=torch.int64),
        query_start_cpu=np.array([0, 1], np.int32),
        seq_lens_cpu=lens,
        num_decode_rows=1,
        block_size=meta.block_size,
        workspace=meta.workspace,
    )


# Keys of decoding rows, and the blocks of 16 that each has in common with the row before it.
SHARING = {
    "all": ([200, 199, 193, 260, 192], [12, 12, 12, 12]),
    "to the last key": ([128, 128, 129], [8, 8]),
    "two groups": ([300, 310, 90, 95, 400], [18, 0, 5, 0]),
    "less and less": ([500, 500, 500, 500], [30, 20, 8]),
    "too little": ([70, 71, 72], [3, 3]),
    "more than a task holds": ([150 + n for n in range(40)], [8] * 39),
}


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 50, 170])
@pytest.mark.parametrize(("lens", "shared_blocks"), SHARING.values(), ids=SHARING.keys())
def test_rows_with_common_blocks_have_the_bits_of_each_alone(dtype, window, lens, shared_blocks) -> None:
    rows = [(1, length) for length in lens]
    batch = share_prefixes(
        make_batch([*rows, (30, 90)], block_size=16, num_heads=6, num_kv_heads=2, head_dim=32, dtype=dtype),
        shared_blocks,
    )
    query, _, _, key_cache, value_cache, meta = batch
    together = attend(batch, window, "native")
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(together, attend(batch, window, "reference"), **tolerance)
    for row in range(len(lens)):
        alone = (query[row : row + 1], None, None, key_cache, value_cache, row_alone(meta, row))
        assert torch.equal(attend(alone, window, "native"), together[row : row + 1]), row


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all", [(192, [0, 1, 2, 3, 4])]),
        ("to the last key", [(128, [0, 1, 2])]),
        ("two groups", [(256, [0, 1]), (64, [2, 3])]),
        ("less and less", [(320, [0, 1, 2])]),
        ("too little", []),
        ("more than a task holds", [(128, list(range(21))), (128, list(range(21, 40)))]),
    ],
)
def test_which_rows_are_attended_together(name, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    lens, shared_blocks = SHARING[name]
    rows = [(1, length) for length in lens]
    *_, meta = share_prefixes(
        make_batch(rows, block_size=16, num_heads=6, num_kv_heads=2, head_dim=32, dtype=torch.float32), shared_blocks
    )
    found = native_attention._rows_together(meta, 64 // 3)
    assert sorted(found, key=lambda group: group[1]) == expected


@needs_library
def test_what_lies_in_the_cache_behind_the_keys_does_not_matter() -> None:
    batch = make_batch(ROWS, block_size=16, num_heads=6, num_kv_heads=2, head_dim=32, dtype=torch.bfloat16)
    expected = attend(batch, None, "native")
    _, _, _, key_cache, value_cache, meta = batch
    for row, num_keys in enumerate(meta.seq_lens_cpu):
        block, offset = meta.block_tables[row, (num_keys - 1) // 16], (num_keys - 1) % 16 + 1
        key_cache[block, :, offset:] = float("nan")
        value_cache[block, :, offset:] = float("inf")
    assert torch.equal(attend(batch, None, "native"), expected)


class TestIdleTeam:
    @pytest.fixture(autouse=True)
    def two_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    @needs_library
    def test_results_and_errors_pass(self) -> None:
        assert native.with_idle_team(lambda: native.with_idle_team(lambda: 5)) == 5
        for error in (ValueError("oh"), KeyboardInterrupt()):

            def work(error: BaseException = error) -> None:
                raise error

            with pytest.raises(type(error)) as caught:
                native.with_idle_team(work)
            assert caught.value is error

    def test_an_interrupt_that_ctypes_has_dropped_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Interrupted:
            def taco_with_idle_team(self, work: object, num_threads: int) -> None:
                pass

        monkeypatch.setattr(native, "library", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            native.with_idle_team(lambda: 5)
