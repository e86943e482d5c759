"""Norms on the CPU: `ssmoe.ops.reference.residual_norm` in one pass forward and one backward (`csrc/norm.h`).

The pass backward adds the stream's own gradient.
"""

from typing import Any, cast

import torch
from torch import Tensor

from ssmoe.ops.cpu.state import any_gradient
from ssmoe.ops.reference.residual_norm import residual_norm as torch_norm

_FLOATS = (torch.float32, torch.bfloat16)


def residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype,
    add: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x and add (..., d), weight and bias (d,) -> (x + add, its norm in `dtype`); see the reference."""
    x = x if add is None else x + add
    if not (x.dtype in _FLOATS and dtype in _FLOATS) and not x.dtype == dtype == torch.float64:
        return torch_norm(x, weight, bias, eps=eps, dtype=dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    if not any_gradient(x, weight, bias):
        return x, torch.ops.ssmoe.row_norm(x, weight, bias, eps, dtype, False)[0]
    return cast(tuple[Tensor, Tensor], _ResidualNorm.apply(x, weight, bias, eps, dtype))


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y, moments = torch.ops.ssmoe.row_norm(x, weight, bias, eps, dtype, True)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        dstream, dy = grad_outputs
        if dy is None:
            return dstream, None, None, None, None
        x, weight, bias, moments = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.ssmoe.row_norm_backward(dstream, dy, x, weight, bias, ctx.eps, moments)
        return dx, dweight, None if bias is None else dbias, None, None


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // weight.numel() if keep else 0
    return x.new_empty(x.shape, dtype=dtype), weight.new_empty(rows, 2)


def _backward_fake(
    dstream: Tensor | None, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    none = weight.new_empty(0 if bias is None else weight.shape[0])
    return x.new_empty(x.shape), torch.empty_like(weight), none


torch.library.register_fake("ssmoe::row_norm", _fake)
torch.library.register_fake("ssmoe::row_norm_backward", _backward_fake)
