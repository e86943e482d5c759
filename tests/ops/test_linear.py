"""The matrix product of every backend on the CPU against float64, forward and every gradient."""

import pytest
import torch
from torch import Tensor

from ssmoe.ops import BACKENDS, load, missing

ON_CPU = [name for name in BACKENDS if name != "triton" and not missing(name)]
SHAPES = [
    ((1,), 3, 5),
    ((4, 7), 5, 3),
    ((0,), 3, 2),
    ((2, 63), 133, 200),
    ((1,), 1500, 1601),
    ((9999,), 257, 1),
]


def run(product, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = product(*inputs)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in inputs if t.grad is not None)]


def draw(rows: tuple[int, ...], d_in: int, d_out: int, *, bias: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [normal(*rows, d_in), normal(d_out, d_in), normal(d_out) if bias else None, normal(*rows, d_out)]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_float64(backend, bias, rows, d_in, d_out, dtype) -> None:
    exact = draw(rows, d_in, d_out, bias=bias)
    expected = run(lambda x, w, b=None: x @ w.T + (0 if b is None else b), *exact)
    narrow = [None if t is None else t.to(dtype) for t in exact]
    found = run(load(backend).linear, *narrow)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("backend", ON_CPU)
def test_parameters_may_be_wider_or_transposed(backend: str) -> None:
    x, weight, bias, _ = draw((3, 5), 8, 6, bias=True)
    assert x is not None
    assert weight is not None
    linear = load(backend).linear
    y = linear(x.bfloat16(), weight.float().requires_grad_(), bias)
    assert y.dtype == torch.bfloat16
    transposed = weight.float().t().contiguous().t()
    torch.testing.assert_close(linear(x.float(), transposed), (x @ weight.T).float())
    strided = torch.stack((x, x), dim=-1)[..., 0].float()
    torch.testing.assert_close(linear(strided, weight.float()), (x @ weight.T).float())


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_of_what_is_not_wanted_are_left_out(backend: str) -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    load(backend).linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


# torch's own, from tracing any autograd.Function and from its compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out", "compiler"),
    [
        (3, 8, 6, "aot_eager"),
        (64, 128, 512, "aot_eager"),  # beyond what is left to torch
        pytest.param(64, 128, 512, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiles_as_one_graph(backend: str, rows: int, d_in: int, d_out: int, compiler: str) -> None:
    linear = load(backend).linear
    arguments = [t.float() for t in draw((rows,), d_in, d_out, bias=True) if t is not None]
    torch.compiler.reset()
    expected = run(linear, *arguments)
    found = run(torch.compile(linear, fullgraph=True, backend=compiler), *arguments)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
