"""Normalisation on the CPU: `ssmoe.ops.reference.norm` in one pass forward and one backward, by `csrc/norm.h`."""

from typing import Any

import torch
from torch import Tensor

from ssmoe.ops.cpu.state import any_gradient
from ssmoe.ops.reference.norm import norm as torch_norm

_FLOATS = (torch.float32, torch.bfloat16)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., d), weight and bias (d,) -> (..., d) in `dtype`; see the reference."""
    if not (x.dtype in _FLOATS and dtype in _FLOATS) and not x.dtype == dtype == torch.float64:
        return torch_norm(x, weight, bias, eps, dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    y, _ = torch.ops.ssmoe.norm(x, weight, bias, eps, dtype, any_gradient(x, weight, bias))
    return y


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // weight.numel() if keep else 0
    return x.new_empty(x.shape, dtype=dtype), weight.new_empty(rows, 2)


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    none = weight.new_empty(0 if bias is None else weight.shape[0])
    return x.new_empty(x.shape), torch.empty_like(weight), none


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, _, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    x, weight, bias, moments = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.ssmoe.norm_backward(dy, x, weight, bias, ctx.eps, moments)
    return dx, dweight, None if bias is None else dbias, None, None, None


torch.library.register_fake("ssmoe::norm", _fake)
torch.library.register_fake("ssmoe::norm_backward", _backward_fake)
torch.library.register_autograd("ssmoe::norm", _backward, setup_context=_save)
