from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taco.kernels.norm import layer_norm, rms_norm

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def exact_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@given(
    st.sampled_from(rms_norm.names), st.integers(1, 20), st.integers(1, 130), st.sampled_from(DTYPES), st.integers(0, 9)
)
def test_rms_norm_equals_its_definition(name: str, rows: int, size: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, size, generator=generator) * 10.0 ** (seed - 4)).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    with rms_norm.forced(name):
        out = rms_norm(x, weight, EPS)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), exact_rms_norm(x, weight), rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", rms_norm.names)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_added_first_and_the_sum_returned(name: str, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 7, 40).to(dtype)
    x_before, residual_before = x.clone(), residual.clone()
    weight = torch.rand(40).to(dtype)
    with rms_norm.forced(name):
        normed, total = rms_norm(x, weight, EPS, residual)
        assert torch.equal(total, x + residual)
        assert torch.equal(normed, rms_norm(total, weight, EPS))
    assert torch.equal(x, x_before) and torch.equal(residual, residual_before)


@pytest.mark.parametrize("name", [name for name in rms_norm.names if name != "cpu"])  # which declines it
def test_a_float32_weight_is_applied_before_the_only_rounding(name: str) -> None:
    x = torch.randn(50, 64).bfloat16()
    weight = 1 + torch.randn(64) * 0.001  # lost in bfloat16
    with rms_norm.forced(name):
        out = rms_norm(x, weight, EPS)
    assert out.dtype == torch.bfloat16
    rounded_once = exact_rms_norm(x, weight).bfloat16()
    assert (out != rounded_once).float().mean() < 0.01  # ties that float32 sums decide the other way


@pytest.mark.parametrize("name", rms_norm.names)
def test_heads_can_have_weights_of_their_own(name: str) -> None:
    heads = torch.randn(4, 9, 3, 16)[:, :5, 1]  # a view, as of queries and keys in a fused projection
    weight = torch.randn(5, 16)
    with rms_norm.forced(name):
        out = rms_norm(heads, weight, EPS)
    torch.testing.assert_close(out, exact_rms_norm(heads, weight).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    x, weight = torch.randn(100, 96).to(dtype), torch.rand(96).to(dtype)
    batch = rms_norm(x, weight, EPS)
    for start, stop in [(0, 1), (1, 8), (8, 99)]:
        torch.testing.assert_close(rms_norm(x[start:stop], weight, EPS), batch[start:stop], atol=1e-6, rtol=2**-7)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_equals_its_definition(affine: bool) -> None:
    x, residual = torch.randn(2, 9, 40)
    weight, bias = (torch.randn(40), torch.randn(40)) if affine else (None, None)
    total = (x + residual).double()
    exact = (total - total.mean(-1, keepdim=True)) / (total.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()
    if weight is not None and bias is not None:
        exact = exact * weight.double() + bias.double()
    normed, returned = layer_norm(x, weight, bias, EPS, residual)
    torch.testing.assert_close(normed, exact.float())
    assert torch.equal(returned, x + residual)
    torch.testing.assert_close(layer_norm(x + residual, weight, bias, EPS), normed)
