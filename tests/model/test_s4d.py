"""S4D: its two modes, a scalar recurrence, segments and initial values."""

from math import pi

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.model.mixers.s4d import S4D, DiagonalParameters, convolve, recur
from ssmoe.training.optimizer import parameter_groups


def draw(parametrisation: str, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    layer = S4D(4, d_state=6, parametrisation=parametrisation).double()  # pyright: ignore[reportArgumentType]
    rate, CB, _ = layer.ssm()
    x = torch.randn(2, length, layer.d_inner, dtype=torch.float64)
    h = torch.randn(2, layer.d_inner, 6, dtype=rate.dtype)
    return x, rate.detach(), CB.detach(), h


@pytest.mark.parametrize("length", [1, 2, 63, 100, 1000])
@pytest.mark.parametrize("parametrisation", ["real", "complex"])
def test_the_two_modes_agree(parametrisation: str, length: int) -> None:
    inputs = draw(parametrisation, length)
    inputs = tuple(t.requires_grad_() for t in inputs)
    one, two = recur(*inputs), convolve(*inputs)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    weights = torch.randn_like(one[0])
    gradients = [torch.autograd.grad((y * weights).sum() + h.abs().sum(), inputs) for y, h in (one, two)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parametrisation", ["real", "complex"])
def test_the_recurrence_in_python_numbers(parametrisation: str) -> None:
    torch.manual_seed(0)
    layer = S4D(2, d_state=3, parametrisation=parametrisation, d_conv=2).double()  # pyright: ignore[reportArgumentType]
    x = torch.randn(1, 7, 2, dtype=torch.float64)
    out = layer(x)
    inner, z = layer.in_proj(x).chunk(2, dim=-1)
    inner, _ = layer.ops.causal_conv1d(inner, layer.conv.weight, layer.conv.bias)
    ssm = layer.ssm
    y = torch.zeros(7, layer.d_inner, dtype=torch.float64)
    for d in range(layer.d_inner):
        delta = float(F.softplus(ssm.delta_bias[d]).detach())
        for n in range(3):
            A = complex(-float(ssm.A_log[d, n].exp().detach()), 0)
            if ssm.A_imaginary is None:
                C = complex(float(ssm.C[d, n].detach()))
            else:
                A += 1j * float(ssm.A_imaginary[d, n].detach())
                C = 2 * complex(*ssm.C[d, n].tolist())
            abar = torch.exp(torch.tensor(delta * A)).item()
            h = 0j
            for t in range(7):
                h = abar * h + (abar - 1) / A * float(inner[0, t, d].detach())
                y[t, d] += (C * h).real
        y[:, d] += (ssm.D[d] * inner[0, :, d]).detach()
    torch.testing.assert_close(out.x[0], layer.out_proj(y * F.silu(z[0])))


def test_initial_values_are_s4d_real_and_s4d_lin() -> None:
    real = S4D(4, d_state=5, parametrisation="real").ssm
    torch.testing.assert_close(-real.A_log.exp(), -torch.arange(1.0, 6).expand(8, 5))
    lin = S4D(4, d_state=5).ssm
    assert lin.A_imaginary is not None
    torch.testing.assert_close(-lin.A_log.exp(), torch.full((8, 5), -0.5))
    torch.testing.assert_close(lin.A_imaginary, pi * torch.arange(5.0).expand(8, 5))
    assert float(lin.C.detach().square().sum(-1).mean()) == pytest.approx(1, rel=0.5)


def test_parameters_stay_float32_and_a_is_never_decayed() -> None:
    layer = S4D(4).to(torch.bfloat16)
    assert isinstance(layer.ssm, DiagonalParameters)
    assert {p.dtype for p in layer.ssm.parameters()} == {torch.float32}
    kept = {name for name in parameter_groups(layer).not_decayed if name.startswith("ssm")}
    assert kept == {"ssm.A_log", "ssm.A_imaginary", "ssm.D", "ssm.delta_bias"}
    out = layer(torch.randn(2, 5, 4).bfloat16())
    assert out.x.dtype == torch.bfloat16
    assert out.state.ssm.dtype == torch.float32
