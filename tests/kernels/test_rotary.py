from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taco.kernels.rotary import rotary


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def angles_of(positions: torch.Tensor, size: int) -> torch.Tensor:
    """float64 [T, 1, size / 2]."""
    return positions.double()[:, None, None] * 100.0 ** -(torch.arange(size // 2).double() / size)


def arguments(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 20), st.integers(0, 6))
def test_pairs_turn_as_complex_numbers_and_the_rest_stays(tokens: int, heads: int, half: int, extra: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    size = 2 * half
    x = torch.randn(tokens, heads, size + extra, generator=generator)
    before = x.clone()
    angles = angles_of(torch.randint(0, 50, (tokens,), generator=generator), size)
    rotary(x, *arguments(angles, torch.float32))
    pairs = torch.complex(before[..., :half].double(), before[..., half:size].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(x[..., :half].double(), turned.real, atol=1e-5, rtol=0)
    torch.testing.assert_close(x[..., half:size].double(), turned.imag, atol=1e-5, rtol=0)
    assert torch.equal(x[..., size:], before[..., size:])


def test_dot_products_depend_on_the_distance_only() -> None:
    query, key = torch.randn(2, 1, 3, 16)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        q, k = query.clone(), key.clone()
        rotary(q, *arguments(angles_of(torch.tensor([query_position]), 16), torch.float32))
        rotary(k, *arguments(angles_of(torch.tensor([key_position]), 16), torch.float32))
        return (q * k).sum(-1)

    torch.testing.assert_close(score(7, 3), score(57, 53), atol=1e-4, rtol=0)
    assert (score(7, 3) - score(7, 4)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_view_of_a_fused_projection_is_turned_in_place(dtype: torch.dtype) -> None:
    fused = torch.randn(6, 8, 12).to(dtype)
    before = fused.clone()
    cos, sin = arguments(angles_of(torch.arange(6), 12), dtype)
    rotary(fused[:, :5], cos, sin)
    assert torch.equal(fused[:, 5:], before[:, 5:])
    alone = before[:, :5].contiguous()
    rotary(alone, cos, sin)
    assert torch.equal(fused[:, :5], alone)
    assert not torch.equal(fused[1:, :5], before[1:, :5])
