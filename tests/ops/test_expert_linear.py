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


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("wide", [False, True])
def test_bfloat16_and_its_gradients_follow_float64(backend: str, wide: bool) -> None:
    """As close as the reference, with experts that nobody chose and weights of either type."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(70, 37, generator=generator).bfloat16()
    bank = torch.randn(6, 45, 37, generator=generator).bfloat16()
    expert = torch.randint(-1, 5, (70, 3), generator=generator, dtype=torch.int32)
    weight = torch.rand(70, 3, generator=generator)
    dy = torch.randn(70, 45, generator=generator).bfloat16()

    def run(backend: str, dtype: torch.dtype, bank_dtype: torch.dtype) -> list[Tensor]:
        inputs = [
            t.to(d).requires_grad_() for t, d in ((x, dtype), (bank, bank_dtype), (weight, weight.dtype))
        ]
        y = load(backend).expert_linear(inputs[0], inputs[1], expert=expert, weight=inputs[2])
        grads = torch.autograd.grad(y, inputs, dy.to(y.dtype))
        assert [g.dtype for g in grads] == [i.dtype for i in inputs]
        return [t.detach().double() for t in (y, *grads)]

    exact = run("reference", torch.float64, torch.float64)
    eager = run("reference", torch.bfloat16, torch.bfloat16)
    found = run(backend, torch.bfloat16, torch.float32 if wide and backend != "reference" else torch.bfloat16)
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.skipif(bool(missing("cpu")), reason=str(missing("cpu")))
def test_the_grouped_product_passes_opcheck() -> None:
    load("cpu")
    offset = torch.tensor([0, 3, 3, 10])
    a, b, c = torch.randn(10, 5), torch.randn(3, 5, 7), torch.randn(10, 4)
    torch.library.opcheck(torch.ops.ssmoe.grouped_product, (a, b, offset, False, False))
    torch.library.opcheck(torch.ops.ssmoe.grouped_product, (a.bfloat16(), c.bfloat16(), offset, True, True))


@pytest.mark.skipif(bool(missing("cpu")), reason=str(missing("cpu")))
def test_an_expert_that_does_not_exist_is_refused() -> None:
    x, bank, expert, weight = draw(4, 1)
    with pytest.raises(ValueError, match="expert 4 is not between -1 and 3"):
        load("cpu").expert_linear(x, bank, expert=torch.full_like(expert, 4), weight=weight)
