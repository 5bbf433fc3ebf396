from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.kernels import native, triton
from taco.kernels.token_mask import apply_token_mask, draw_allowed, num_mask_words
from tests.kernels.triton_tools import SHARED_MEMORY, compile_ahead, interpreted
from tests.simulated_cuda import simulated_and_real_cuda  # noqa: F401

VARIANTS = ["reference", *(f"native {name}" for name in native.instruction_sets())]
USABLE = triton.usable
if triton.installed():
    VARIANTS.append("triton in the interpreter")

# Beside and at the borders of words, of the groups of 8 words and chunks of 2048 words that the native kernel handles
# together, and of the 1024 tokens of a program of the Triton kernel.
VOCABS = [1, 31, 32, 33, 255, 256, 257, 1000, 1024, 1025, 65536 + 2 * 256 + 40]


def apply(variant: str, logits: torch.Tensor, masks: torch.Tensor, positions: torch.Tensor) -> None:
    if variant == "triton in the interpreter":
        from taco.kernels.triton import token_mask

        with mock.patch.object(token_mask, "token_mask_kernel", interpreted(token_mask.token_mask_kernel)):
            token_mask.apply_token_mask(logits, masks, positions)
    elif variant == "reference":
        with apply_token_mask.forced("reference"):
            apply_token_mask(logits, masks, positions)
    else:
        with native.forced(variant.split()[1]), apply_token_mask.forced("native"):
            apply_token_mask(logits, masks, positions)


def masked(logits: torch.Tensor, masks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """By definition."""
    out = logits.clone()
    for row, words in zip(positions.tolist(), masks.numpy().astype("<i4"), strict=True):
        bits = np.unpackbits(words.view(np.uint8), count=logits.shape[1], bitorder="little")
        out[row, torch.from_numpy(bits) == 0] = -torch.inf
    return out


def assert_same_bits(x: torch.Tensor, y: torch.Tensor) -> None:
    assert torch.equal(x.view(torch.int32), y.view(torch.int32))


def random_masks(num_masks: int, vocab: int, kind: str, seed: int) -> torch.Tensor:
    """Masks that forbid all, forbid nothing, forbid every other token, or do all of this in runs of 8 words."""
    generator = np.random.default_rng(seed)
    shape = num_masks, num_mask_words(vocab)
    words = generator.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)
    if kind == "runs":
        choice = generator.integers(0, 3, (num_masks, -(-shape[1] // 8))).repeat(8, 1)[:, : shape[1]]
        words = np.where(choice == 0, words, np.where(choice == 1, 0, -1)).astype(np.int32)
    elif kind != "mixed":
        words[:] = {"none": 0, "all": -1}[kind]
    return torch.from_numpy(words)


def random_logits(num_rows: int, vocab: int, seed: int) -> torch.Tensor:
    """Among them what a mask must keep where it is allowed and overwrite where it is not: NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab, generator=generator)
    kinds = torch.randint(0, 20, logits.shape, generator=generator)
    for kind, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[kinds == kind] = value
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", ["none", "all", "mixed", "runs"])
def test_forbidden_tokens_become_minus_infinity_and_nothing_else_changes(variant: str, vocab: int, kind: str) -> None:
    # Rows of both tensors lie in wider ones, whose other columns show what is written beside them.
    wide = random_logits(7, vocab + 40, seed=vocab)
    masks = random_masks(5, vocab + 64, kind, seed=vocab)[:, : num_mask_words(vocab)]
    positions = torch.tensor([3, 6, 0, 5, 1])
    expected = torch.cat((masked(wide[:, :vocab], masks, positions), wide[:, vocab:]), 1)
    before = masks.clone()
    apply(variant, wide[:, :vocab], masks, positions)
    assert_same_bits(wide, expected)
    assert torch.equal(masks, before)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=30)
@given(
    num_rows=st.integers(1, 6),
    vocab=st.integers(1, 1500),
    kind=st.sampled_from(["none", "all", "mixed", "runs"]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_any_rows_any_masks(variant: str, num_rows: int, vocab: int, kind: str, seed: int, data: st.DataObject) -> None:
    positions = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, unique=True)))
    logits, masks = random_logits(num_rows, vocab, seed), random_masks(len(positions), vocab, kind, seed)
    expected = masked(logits, masks, positions)
    apply(variant, logits, masks, positions)
    assert_same_bits(logits, expected)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "triton" not in name])
@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows(variant: str, threads: int) -> None:
    logits, masks = random_logits(300, 3001, seed=1), random_masks(290, 3001, "runs", seed=2)
    positions = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:290]
    expected = masked(logits, masks, positions)
    torch.set_num_threads(threads)
    apply(variant, logits, masks, positions)
    assert_same_bits(logits, expected)


def test_only_the_named_bit_of_the_named_word_counts() -> None:
    masks = torch.zeros(2, 3, dtype=torch.int32)
    masks[0, 1] = 1 << 5
    masks[1, 2] = -(2**31)  # bit 31
    logits = torch.zeros(3, 96)
    apply_token_mask(logits, masks, torch.tensor([2, 0]))
    assert logits.isfinite().nonzero().tolist() == [[0, 95], *([1, token_id] for token_id in range(96)), [2, 37]]


@pytest.mark.parametrize("name", ["reference", "native", "dispatch"])
def test_no_masks_change_nothing(name: str) -> None:
    logits = torch.zeros(2, 70)
    masks, positions = torch.empty(0, 3, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    if name == "native" and native.library() is None:
        pytest.skip(native.why_missing() or "")
    if name == "dispatch":
        apply_token_mask(logits, masks, positions)
    else:
        with apply_token_mask.forced(name):
            apply_token_mask(logits, masks, positions)
    assert not logits.any()


# Few allowed tokens are listed by the native kernel, and many are not: one in 16 is the limit.
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "triton" not in name])
@settings(max_examples=100)
@given(
    num_rows=st.integers(1, 4),
    vocab=st.one_of(st.integers(1, 600), st.integers(60, 70).map(lambda words: 32 * words)),
    share=st.sampled_from([0.0, 0.002, 0.05, 0.0625, 0.08, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    number=st.floats(0, 1, exclude_max=True),
    data=st.data(),
)
def test_draws_are_those_from_masked_rows(
    variant: str, num_rows: int, vocab: int, share: float, seed: int, number: float, data: st.DataObject
) -> None:
    positions = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, unique=True)))
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(0, 3, (num_rows, vocab)).astype(np.float32))
    padding = 32 * num_mask_words(vocab) - vocab
    bits = np.pad(generator.random((len(positions), vocab)) < share, ((0, 0), (0, padding)), constant_values=True)
    masks = torch.from_numpy(np.packbits(bits, -1, "little").view("<i4"))
    left = masked(logits, masks, positions)[positions]
    before = logits.clone()
    uniforms = torch.full((len(positions),), number, dtype=torch.float64)
    names = variant.split()
    with draw_allowed.forced(names[0]), native.forced(names[-1]) if len(names) > 1 else contextlib.nullcontext():
        peaks, token_ids, drawn = draw_allowed(logits, positions, masks, uniforms)
    assert_same_bits(logits, before)
    assert_same_bits(peaks, left.amax(-1))
    for row, peak in enumerate(peaks.tolist()):
        assert token_ids[row] == left[row].argmax()
        if peak == -np.inf:
            continue
        mass = left[row].double().softmax(-1).cumsum(-1)
        token_id = int(drawn[row])
        assert left[row, token_id] > -np.inf
        # The other sums have rounding errors.
        assert (mass[token_id - 1] if token_id else 0) <= number + 1e-6 and number - 1e-6 <= mass[token_id]


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize("share", [0.01, 0.9])
def test_allowed_logits_that_are_no_numbers_are_reported(name: str, share: float) -> None:
    if name == "native" and native.library() is None:
        pytest.skip(native.why_missing() or "")
    logits = torch.zeros(3, 3200)
    logits[:, 7], logits[:, 3199] = torch.nan, torch.inf
    bits = np.random.default_rng(1).random((3, 3200)) < share
    bits[:, [7, 3199]] = [[False, False], [True, False], [False, True]]
    masks = torch.from_numpy(np.packbits(bits, -1, "little").view("<i4"))
    with draw_allowed.forced(name):
        peaks, _, drawn = draw_allowed(logits, torch.arange(3), masks, torch.full((3,), 0.5, dtype=torch.float64))
    assert peaks.isnan().tolist() == [False, True, False]
    assert peaks[0] == 0 and peaks[2] == torch.inf
    assert ((drawn >= 0) & (drawn < 3200)).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_draw_does_not_depend_on_the_rows_beside_it(threads: int) -> None:
    torch.set_num_threads(threads)
    logits = torch.randn(50, 5000, generator=torch.Generator().manual_seed(1))
    masks = torch.cat((random_masks(25, 5000, "runs", seed=2), random_masks(25, 5000, "mixed", seed=3) & 1 << 9))
    positions = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    uniforms = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    together = draw_allowed(logits, positions, masks, uniforms)
    for row in range(50):
        own = slice(row, row + 1)
        alone = draw_allowed(logits[positions[own]], torch.tensor([0]), masks[own], uniforms[own])
        assert [found[0] for found in alone] == [found[row] for found in together]


@pytest.mark.parametrize("transposed", ["logits", "masks", "positions"])
def test_other_layouts_give_the_same(transposed: str) -> None:
    tensors = {
        "logits": random_logits(4, 300, seed=1),
        "masks": random_masks(2, 300, "mixed", seed=2),
        "positions": torch.tensor([3, 1]),
    }
    expected = masked(*tensors.values())
    tensors[transposed] = torch.stack((tensors[transposed],) * 2, -1)[..., 0]  # every other entry of memory
    assert not tensors[transposed].is_contiguous()
    apply_token_mask(*tensors.values())
    assert_same_bits(tensors["logits"].contiguous(), expected)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_masks_of_another_vocabulary_are_refused(name: str) -> None:
    if name == "native" and native.library() is None:
        pytest.skip(native.why_missing() or "")
    with apply_token_mask.forced(name), pytest.raises(AssertionError):
        apply_token_mask(torch.zeros(2, 96), torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0]))


@pytest.mark.parametrize(("vocab", "num_words"), [(1, 1), (31, 1), (32, 1), (33, 2), (49152, 1536)])
def test_num_mask_words(vocab: int, num_words: int) -> None:
    assert num_mask_words(vocab) == num_words


@pytest.mark.skipif(not triton.installed(), reason="no Triton here")
def test_the_triton_kernel_compiles_ahead_of_time(tmp_path: Path, record_property) -> None:
    from taco.kernels.triton.token_mask import BLOCK, NUM_WARPS

    pointers = {"logits": "*fp32", "masks": "*i32", "positions": "*i64"}
    integers = dict.fromkeys(["logits_stride", "masks_stride", "vocab"], "i32")
    compiled = compile_ahead(
        "taco.kernels.triton.token_mask:token_mask_kernel",
        pointers | integers | {"BLOCK": "constexpr"},
        tmp_path,
        constants={"BLOCK": BLOCK},
        num_warps=NUM_WARPS,
    )
    assert list(compiled) == [80, 90]
    for architecture, resources in compiled.items():
        record_property(f"sm_{architecture}", resources[:3])
        assert resources.spilled == 0
        assert resources.registers <= 32  # then the registers suffice for all threads that a multiprocessor can hold
        assert resources.shared <= SHARED_MEMORY[architecture]


@pytest.mark.usefixtures("simulated_and_real_cuda")
def test_where_triton_cannot_start_a_kernel_others_stand_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setitem(sys.modules, "taco.kernels.triton.token_mask", SimpleNamespace(apply_token_mask=fail))
    monkeypatch.setattr(triton, "token_mask", sys.modules["taco.kernels.triton.token_mask"], raising=False)
    monkeypatch.setattr(triton, "_has_failed", False)
    monkeypatch.setattr(triton, "installed", lambda: True)
    monkeypatch.setattr(triton, "usable", USABLE)
    logits, masks, positions = random_logits(4, 70, seed=1), random_masks(3, 70, "mixed", seed=1), torch.arange(3)
    for _ in range(2):
        on_gpu = logits.cuda()
        apply_token_mask(on_gpu, masks.cuda(), positions.cuda())
        assert_same_bits(on_gpu.cpu(), masked(logits, masks, positions))
    assert not triton.usable()
    assert caplog.text.count("Failed to find C compiler") == 1 and "Python.h" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [*VOCABS, 151936])
@pytest.mark.parametrize("kind", ["none", "all", "mixed", "runs"])
def test_the_triton_kernel_on_a_gpu(vocab: int, kind: str) -> None:
    wide, masks = random_logits(65, vocab + 40, seed=vocab), random_masks(60, vocab, kind, seed=vocab)
    positions = torch.randperm(65, generator=torch.Generator().manual_seed(3))[:60]
    expected = torch.cat((masked(wide[:, :vocab], masks, positions), wide[:, vocab:]), 1)
    for name in ("triton", "reference"):
        on_gpu = wide.cuda()
        with apply_token_mask.forced(name):
            apply_token_mask(on_gpu[:, :vocab], masks.cuda(), positions.cuda())
        assert_same_bits(on_gpu.cpu(), expected)
