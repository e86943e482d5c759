"""Layer and RMS norm of every backend on the CPU against float64, forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.ops import BACKENDS, load, missing

ON_CPU = [name for name in BACKENDS if name != "triton" and not missing(name)]
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, 1e-5)
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def normed(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    return load(backend).residual_norm(x, weight, bias, eps=1e-5, dtype=dtype)[1]


def run(function, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*leaves, *([None] * (3 - len(leaves))))
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (3, 7), (2, 5, 33), (70, 64), (300, 100)])
@pytest.mark.parametrize(("x_dtype", "y_dtype"), PAIRS)
def test_equals_float64(backend: str, with_bias: bool, shape: tuple[int, ...], x_dtype, y_dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    d = shape[-1]
    x, dy = (torch.randn(*shape, generator=generator).to(t) for t in (x_dtype, y_dtype))
    wide = torch.promote_types(x_dtype, torch.float32)
    weight, bias = (torch.randn(d, generator=generator).to(wide) for _ in range(2))
    inputs = (x, weight, bias if with_bias else None)
    found = run(lambda *args: normed(backend, *args, dtype=y_dtype), *inputs, dy)
    expected = run(exact, *(None if t is None else t.double() for t in inputs), dy.double())
    dtypes = [y_dtype, x_dtype, wide, wide]
    for ours, theirs, dtype in zip(found, expected, dtypes, strict=False):
        assert ours.dtype == dtype
        tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[
            torch.bfloat16 if torch.bfloat16 in (x_dtype, y_dtype) and dtype != wide else dtype
        ]
        torch.testing.assert_close(
            ours.double(), theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max()))
        )


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("value", [0.0, 1e18, -1e-18])
def test_extreme_rows_stay_finite(backend: str, value: float) -> None:
    x, weight = torch.full((2, 20), value), torch.ones(20)
    assert all(t.isfinite().all() for t in run(
        lambda *args: normed(backend, *args, dtype=torch.float32), x, weight, None, torch.ones(2, 20)
    ))  # fmt: skip


@pytest.mark.parametrize("backend", ON_CPU)
def test_strided_rows(backend: str) -> None:
    x = torch.randn(4, 6, 10).transpose(0, 1)
    weight = torch.randn(10)
    torch.testing.assert_close(normed(backend, x, weight, None, dtype=x.dtype), exact(x, weight, None))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_stream_is_added(backend: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(6)
    stream, y = load(backend).residual_norm(x, weight, None, eps=1e-5, dtype=dtype)
    assert torch.equal(stream, x)
    (2 * stream.sum() + y.float().sum()).backward()
    exact = x.detach().double().requires_grad_()
    (2 * exact.sum() + F.rms_norm(exact, (6,), weight.double(), 1e-5).sum()).backward()
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=1e-5)
    (alone,) = torch.autograd.grad(
        load(backend).residual_norm(x, weight, None, eps=1e-5, dtype=dtype)[0].sum(), x
    )
    assert torch.equal(alone, torch.ones_like(alone))


# torch's own, from tracing any autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_as_one_graph(backend: str) -> None:
    weight = torch.randn(6, requires_grad=True)
    compiled = torch.compile(normed, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6)
    found, expected = (f(backend, x, weight, None, dtype=x.dtype) for f in (compiled, normed))
    torch.testing.assert_close(found, expected)
