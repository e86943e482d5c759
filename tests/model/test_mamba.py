"""The Mamba mixer as a module of its own, its precision and its initial values."""

import pytest
import torch
import torch.nn.functional as F

import ssmoe
from ssmoe.model.mixers.mamba import Mamba


def test_is_public_and_has_the_published_shapes() -> None:
    block = ssmoe.Mamba(d_model=512)
    assert (block.d_inner, block.d_state, block.d_conv, block.dt_rank) == (1024, 16, 4, 32)
    assert sum(p.numel() for p in block.parameters()) == 1_694_720  # arXiv 2401.04081, by its table
    assert ssmoe.Mamba(d_model=32)(torch.randn(2, 7, 32)).x.shape == (2, 7, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ssm_parameters_never_go_below_float32(dtype: torch.dtype) -> None:
    block = Mamba(16)
    before = {name: p.clone() for name, p in block.ssm.named_parameters()}
    block.to(dtype)
    assert block.in_proj.weight.dtype == dtype
    for name, parameter in block.ssm.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
    assert {p.dtype for p in block.double().ssm.parameters()} == {torch.float64}
    assert {p.dtype for p in block.bfloat16().ssm.parameters()} == {torch.float32}


def test_the_state_is_float32_in_a_bfloat16_model() -> None:
    block = Mamba(16).bfloat16()
    out = block(torch.randn(2, 5, 16).bfloat16())
    assert out.x.dtype == torch.bfloat16
    assert out.state.ssm.dtype == torch.float32
    assert out.state.conv.dtype == torch.bfloat16
    again = block(
        torch.randn(2, 1, 16).bfloat16(), block.init_state(2, 0, torch.bfloat16, torch.device("cpu"))
    )
    assert again.state.ssm.dtype == torch.float32


def test_initial_values_are_the_papers() -> None:
    block = Mamba(64, d_state=6)
    A, D, delta_bias = block.ssm()
    torch.testing.assert_close(A, -torch.arange(1.0, 7.0).expand(128, 6))
    assert (D == 1).all()
    steps = F.softplus(delta_bias.detach())
    assert 0.001 * 0.999 <= float(steps.min()) < 0.005
    assert 0.05 < float(steps.max()) <= 0.1 * 1.001
    assert float(block.delta_proj.weight.detach().abs().max()) <= block.dt_rank**-0.5
