"""The Mamba mixer as a module of its own, its precision and its initial values."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import ssmoe
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.ops import missing


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model=0: give at least 1"),
        ({"d_model": 8, "d_state": -1}, "d_state: .*greater than 0"),
        ({"d_model": 8, "dt_rank": "half"}, "dt_rank"),
        ({"d_model": 8, "dt_min": 0.2}, "dt_min=0.2 is above dt_max=0.1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba(**options)


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 7), (1, 2, 5, 8)])
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(batch, length, 8\)"):
        Mamba(8)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_an_input_that_nothing_is_computed_in_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"{dtype} is no dtype to compute in"):
        Mamba(8)(torch.zeros(1, 2, 8, dtype=dtype))


@pytest.mark.skipif(missing("cpu") is not None, reason="the CPU kernels were not built")
def test_a_layer_moved_to_a_gpu_says_how_to_get_its_kernels() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 8, device="cuda")
        with pytest.raises(ValueError, match=r"x is on cuda .* ops=ssmoe.ops.load\('auto', 'cuda'\)"):
            Mamba(8)(x)
