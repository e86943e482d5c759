"""The bank of linear maps against a loop over tokens, and its gradients."""

import pytest
import torch
from torch import Tensor

from ssmoe.ops import BACKENDS, load, missing
from ssmoe.ops.reference import expert_linear

ON_CPU = [name for name in BACKENDS if name != "triton" and not missing(name)]


def draw(t: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(t, 5, generator=generator, dtype=torch.float64).to(dtype)
    bank = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64).to(dtype)
    expert = torch.randint(-1, 3, (t, k), generator=generator, dtype=torch.int32)  # expert 3 stays idle
    return x, bank, expert, torch.rand(t, k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("t", [0, 1, 2, 63])
@pytest.mark.parametrize("backend", ON_CPU)
def test_equals_a_loop(backend: str, t: int, k: int) -> None:
    x, bank, expert, weight = draw(t, k)
    expected = torch.zeros(t, 7, dtype=torch.float64)
    for i in range(t):
        for j in range(k):
            if expert[i, j] >= 0:
                expected[i] += weight[i, j] * (bank[expert[i, j]] @ x[i])
    torch.testing.assert_close(load(backend).expert_linear(x, bank, expert=expert, weight=weight), expected)


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients(backend: str) -> None:
    expert_linear = load(backend).expert_linear
    x, bank, expert, weight = draw(6, 2)
    inputs = [tensor.requires_grad_() for tensor in (x, bank, weight)]
    assert torch.autograd.gradcheck(
        lambda x, bank, weight: expert_linear(x, bank, expert=expert, weight=weight), inputs
    )
    expert_linear(x, bank, expert=expert, weight=weight).sum().backward()
    assert bank.grad is not None
    assert not bank.grad[3].any()


def test_sums_in_float32_and_answers_in_the_inputs_dtype() -> None:
    x, bank, expert, weight = draw(40, 2, torch.bfloat16)
    y = expert_linear(x, bank, expert=expert, weight=weight.float())
    wide = expert_linear(x.double(), bank.double(), expert=expert, weight=weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wide, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("backend", ON_CPU)
def test_large_products_in_float32_follow_float64(backend: str) -> None:
    """Large enough for a backend's own product."""
    generator = torch.Generator().manual_seed(0)
    x, bank = torch.randn(600, 128, generator=generator), torch.randn(2, 96, 128, generator=generator)
    expert = torch.randint(-1, 2, (600, 1), generator=generator, dtype=torch.int32)
    weight = torch.rand(600, 1, generator=generator)
    found: list[list[torch.Tensor]] = []
    for dtype in (torch.float32, torch.float64):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, bank, weight)]
        ops = load(backend if dtype == torch.float32 else "reference")
        y = ops.expert_linear(inputs[0], inputs[1], expert=expert, weight=inputs[2])
        found.append([y.detach().double(), *(g.double() for g in torch.autograd.grad(y.sum(), inputs))])
    for narrow, wide in zip(*found, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-5 * float(wide.abs().max()))
