"""Our own matrix products and what is made of them, at every level of instructions, against float64."""

import pytest
import torch

from ssmoe import ops
from tests.ops.test_cpu_extension import built, python

pytestmark = built

LEVELS = """
import torch
from ssmoe.ops import cpu
from tests.ops import test_cpu_dense as dense
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    dense.check_products(dtype)
    for bias in (False, True):
        dense.check_head(dtype, bias)
        dense.check_norm(dtype, bias)
print(cpu.describe()["level"])
"""


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]


def check_products(dtype: torch.dtype) -> None:
    """Odd sizes, either operand transposed, float32 operands under bfloat16, several pieces of k."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    for m, k, n in ((1, 1, 1), (37, 81, 45), (130, 64, 96), (257, 1100, 70), (3, 2000, 33), (400, 1030, 521)):
        for a_transposed in (False, True):
            for b_transposed in (False, True):
                for b_dtype in {dtype, wide}:
                    a, b = (torch.randn(*shape, generator=generator) for shape in ((m, k), (k, n)))
                    a, b = a.to(dtype), b.to(b_dtype)
                    a = a.t().contiguous().t() if a_transposed else a
                    b = b.t().contiguous().t() if b_transposed else b
                    exact = a.double() @ b.double()
                    for in_wide in (False, True):
                        found = torch.ops.ssmoe.product(a, b, in_wide)
                        assert found.dtype == (wide if in_wide else dtype)
                        error = float((found.double() - exact).abs().max() / exact.abs().max())
                        rounded = not in_wide or b_dtype != dtype
                        assert error < tolerance(dtype if rounded else wide), (m, k, n, error)


def check_head(dtype: torch.dtype, bias: bool) -> None:
    """Loss and gradients, some rows without a target."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x, weight, offset = (
        torch.randn(70, 33).to(dtype),
        torch.randn(101, 33).to(dtype),
        torch.randn(101).to(wide),
    )
    targets = torch.randint(101, (70,))
    targets[::3] = -100
    found = torch.ops.ssmoe.head_cross_entropy(x, weight, offset if bias else None, targets)
    leaves = [t.double().requires_grad_() for t in ((x, weight, offset) if bias else (x, weight))]
    loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*leaves), targets)
    expected = [loss.detach().view(1), *torch.autograd.grad(loss, leaves)]
    for ours, theirs in zip(found, expected, strict=False):
        assert (ours.double() - theirs).abs().max() < tolerance(dtype) * theirs.abs().max()


def check_norm(dtype: torch.dtype, bias: bool) -> None:
    """One row more than the backward pass sums at a time."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [
        torch.randn(65, 35).to(dtype),
        torch.randn(35).to(wide),
        torch.randn(35).to(wide) if bias else None,
    ]
    results = []
    for backend, up in (("cpu", dtype), ("reference", torch.float64)):
        leaves = [
            None if t is None else t.to(up if i == 0 else torch.promote_types(up, torch.float32))
            for i, t in enumerate(inputs)
        ]
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
        _, y = ops.load(backend).residual_norm(*leaves, eps=1e-5, dtype=up)
        y.backward(torch.ones_like(y))
        results.append([y.detach(), *(t.grad for t in leaves if t is not None and t.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours.double() - theirs).abs().max() < tolerance(dtype) * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_equal_float64(dtype: torch.dtype) -> None:
    check_products(dtype)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_every_level_computes_the_same(level: str) -> None:
    found = python(LEVELS, SSMOE_CPU_LEVEL=level)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().lower() in {level, "avx2", "portable"}


def test_products_of_unlike_sizes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="a product of"):
        torch.ops.ssmoe.product(torch.randn(2, 3), torch.randn(4, 5), False)


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RuntimeError, match="outside the vocabulary of 4"):
        torch.ops.ssmoe.head_cross_entropy(torch.randn(1, 3), torch.randn(4, 3), None, torch.tensor([4]))
