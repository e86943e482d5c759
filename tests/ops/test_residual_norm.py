"""The definition against the formulas of both norms."""

import pytest
import torch

from ssmoe.ops.reference import residual_norm


@pytest.mark.parametrize("centre", [False, True])
def test_formula_and_gradient(centre: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    stream, y = residual_norm(x, weight, bias if centre else None, eps=1e-3, dtype=torch.float64)
    value = x - x.mean(-1, keepdim=True) if centre else x
    expected = value / (value.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    expected = expected + bias if centre else expected
    assert torch.equal(stream, x)
    torch.testing.assert_close(y, expected)
    inputs = (x, weight, bias) if centre else (x, weight)
    assert torch.autograd.gradcheck(
        lambda x, weight, bias=None: residual_norm(x, weight, bias, eps=1e-3, dtype=torch.float64), inputs
    )


def test_a_narrow_stream_is_normalised_in_float32() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.bfloat16)
    x[0, 0] = 301
    _, y = residual_norm(x, torch.ones(64), torch.zeros(64), eps=1e-5, dtype=torch.float32)
    _, exact = residual_norm(x.double(), torch.ones(64), torch.zeros(64), eps=1e-5, dtype=torch.float64)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
