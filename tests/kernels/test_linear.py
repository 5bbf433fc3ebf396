from __future__ import annotations

import copy
import pickle
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taco.kernels import native
from taco.kernels.linear import PackedWeight, linear, pack_weight

DTYPES = [torch.float32, torch.bfloat16]
sizes = st.integers(1, 70)


def tensors(rows: int, inner: int, outer: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    weight = torch.randn(outer, inner, generator=generator).to(dtype)
    return x, weight, torch.randn(outer, generator=generator).to(dtype)


@given(st.integers(0, 40), sizes, sizes, st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.integers(0, 99))
def test_products_equal_float64_within_one_rounding(
    rows: int, inner: int, outer: int, dtype: torch.dtype, biased: bool, packed: bool, seed: int
) -> None:
    x, weight, bias = tensors(rows, inner, outer, dtype, seed)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    out = linear(x, pack_weight(weight) if packed else weight, bias if biased else None)
    assert out.dtype == dtype
    assert out.shape == (rows, outer)
    # Sums cancel, so the errors go with the summands: rounding of the result, and float32 sums of `inner` products.
    magnitude = x.double().abs() @ weight.double().abs().T + 1
    assert ((out.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + magnitude * inner * 1e-7).all()


def layouts() -> list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """The layouts of weights, each with the implementation made for it."""
    found: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [("reference", lambda weight: weight)]
    if native.library() is not None:
        found.append(("native", PackedWeight.pack))
    if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64"):
        found.append(("onednn", torch.ops.mkldnn._reorder_linear_weight))
    return found


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "pack"), layouts())
def test_every_layout_agrees(name: str, pack: Callable, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    if name == "onednn" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no products in bfloat16 on this processor")
    x, weight, bias = tensors(5, 48, 33, dtype, 0)
    packed = pack(weight)
    expected = torch.nn.functional.linear(x, weight, bias).to(out_dtype or dtype)
    tolerance = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 2**-7}  # one rounding more or less
    for forced in (name, "reference"):
        with linear.forced(forced):
            out = linear(x, packed, bias, out_dtype)
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_keeps_every_weight(dtype: torch.dtype) -> None:
    _, weight, _ = tensors(1, 38, 53, dtype, 0)
    packed = pack_weight(weight)
    if packed.is_mkldnn or isinstance(packed, PackedWeight):
        assert torch.equal(packed.to_dense(), weight)
    else:
        assert packed is weight
    assert pack_weight(packed) is packed


@pytest.mark.skipif(native.library() is None, reason="no native kernels here")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_packed_weight_can_be_looked_up(dtype: torch.dtype) -> None:
    _, weight, _ = tensors(1, 38, 53, dtype, 0)
    indices = torch.tensor([52, 0, 31, 32, 0])
    assert torch.equal(PackedWeight.pack(weight).rows(indices), weight[indices])


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_bias_of_the_same_weight_is_noticed(dtype: torch.dtype) -> None:
    x, weight, bias = tensors(2, 16, 8, dtype, 0)
    packed = pack_weight(weight)
    linear(x, packed, bias)
    torch.testing.assert_close(linear(x, packed, bias + 1), torch.nn.functional.linear(x, weight, bias + 1))
    torch.testing.assert_close(linear(x, packed), torch.nn.functional.linear(x, weight))


def test_dtypes_without_a_faster_layout_stay_plain() -> None:
    weight = torch.randn(8, 8, dtype=torch.float16)
    assert pack_weight(weight) is weight


def test_views_can_be_multiplied_and_packed() -> None:
    x, weight, _ = tensors(6, 24, 30, torch.float32, 0)
    expected = x[:, :16].contiguous() @ weight[:, :16].contiguous().T
    torch.testing.assert_close(linear(x[:, :16], pack_weight(weight[:, :16])), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear(x[:, :16], weight[:, :16]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [True, False])
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, packed: bool) -> None:
    x, weight, _ = tensors(65, 96, 80, dtype, 0)
    if packed:
        weight = pack_weight(weight)
    batch = linear(x, weight)
    for start, stop in [(0, 1), (1, 4), (4, 20), (20, 64), (64, 65)]:
        if isinstance(weight, PackedWeight):
            assert torch.equal(linear(x[start:stop], weight), batch[start:stop])
        torch.testing.assert_close(linear(x[start:stop], weight), batch[start:stop], atol=1e-5, rtol=2**-7)


def test_unfitting_shapes_are_an_error() -> None:
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 5), pack_weight(torch.randn(3, 4)))


@pytest.mark.skipif(native.library() is None, reason="no native kernels here")
def test_packed_weights_can_be_copied_and_pickled() -> None:
    _, weight, _ = tensors(1, 38, 53, torch.float32, 0)
    packed = PackedWeight.pack(weight)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied.to_dense(), weight) and copied.data_ptr() != packed.data_ptr()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_elsewhere_sums_come_out_unrounded(
    dtype: torch.dtype, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 3, 8), (5, 8), (5,)))
    products: list[tuple[int, ...]] = []
    mm = torch.mm

    def watch(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        products.extend(tuple(b.shape) for _ in options)
        return mm(a, b, **options)

    monkeypatch.setattr(torch, "mm", watch)
    out = linear(x, weight, bias if with_bias else None, torch.float32)
    assert out.shape == (2, 3, 5) and out.dtype == torch.float32
    assert linear(x, weight).dtype == dtype
    assert products == ([] if dtype == torch.float32 else [(8, 5)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_on_a_gpu_come_out_unrounded(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape, device="cuda").to(dtype) for shape in ((3, 64), (500, 64), (500,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, weight, bias, torch.float32).double(), exact, atol=1e-4, rtol=1e-5)
