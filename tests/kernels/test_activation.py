from __future__ import annotations

import math

import pytest
import torch

from taco.kernels.activation import gelu_tanh_and_mul, silu_and_mul


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "function"), [(silu_and_mul, silu), (gelu_tanh_and_mul, gelu_tanh)])
def test_the_first_half_gates_the_second(op: object, function: object, dtype: torch.dtype) -> None:
    x = (torch.randn(9, 2 * 37) * 3).to(dtype)
    before = x.clone()
    gate, up = x.double().chunk(2, -1)
    out = op(x)  # type: ignore[operator]
    assert out.dtype == dtype
    assert torch.equal(x, before)
    # For negative gates 1 + tanh cancels, so the error goes with the gate and not with the result.
    bound = 2 * torch.finfo(dtype).eps * (gate * up).abs() + 1e-6
    assert ((out.double() - function(gate) * up).abs() <= bound).all()  # type: ignore[operator]


@pytest.mark.parametrize("op", [silu_and_mul, gelu_tanh_and_mul])
def test_large_gates_neither_overflow_nor_lose_their_sign(op: object) -> None:
    gate = torch.tensor([[-1e4, 1e4]])
    out = op(torch.cat((gate, torch.full((1, 2), 2.0)), -1))  # type: ignore[operator]
    torch.testing.assert_close(out, torch.tensor([[0.0, 2e4]]))
