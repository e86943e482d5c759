"""Precision: the casting Linear, norms in float32, modules that stay float32."""

import torch
from torch import nn

from ssmoe.model.norm import Float32Module, LayerNorm, Linear, RMSNorm


def test_linear_computes_in_the_inputs_dtype_and_keeps_its_own() -> None:
    layer = Linear(4, 3, bias=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert layer(torch.randn(2, 4).to(dtype)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_norms_equal_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    layer, rms = LayerNorm(5, 1e-5).double(), RMSNorm(5, 1e-5).double()
    for parameter in (*layer.parameters(), *rms.parameters()):
        nn.init.normal_(parameter)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * rms.weight)


def test_norms_give_float32_for_bfloat16() -> None:
    for norm in (LayerNorm(4, 1e-5), RMSNorm(4, 1e-5)):
        for parameter in norm.parameters():
            nn.init.ones_(parameter)
        assert norm(torch.randn(2, 4).bfloat16()).dtype == torch.float32


def test_float32_modules_move_and_widen_but_do_not_narrow() -> None:
    module = Float32Module()
    module.weight = nn.Parameter(torch.randn(3))
    module.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    assert module.half().weight.dtype == torch.float32
    assert module.to("meta").weight.is_meta
    assert Float32Module().double() is not None
    assert module.count.dtype == torch.int64
