"""The matrix product on the CPU: `ssmoe.ops.reference.linear`, through oneDNN where that is the faster.

A few rows without gradients go through `csrc/skinny.h`, which reads the weights at the speed of memory.

torch's float32 product is MKL's, which reaches 40 % of an AMD core where oneDNN, in the same torch, reaches
90 %. bfloat16 is oneDNN's in either; float64 is left to torch.
"""

from typing import Any, cast

import torch
from torch import Tensor

from ssmoe.ops.reference.linear import linear as torch_linear

# measured once for the expert bank too (csrc/experts.cpp)
_ONEDNN = str(torch.ops.ssmoe.cpu_products()) == "oneDNN"

_SMALL = 1 << 21
"""Multiply-adds below which oneDNN's cost of a call, about 20 us more than torch's, outweighs its speed."""


_FEW = 8
"""Rows up to which reading the weights once and in order is what counts."""

_KERNEL = (torch.float32, torch.bfloat16, torch.float64)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., d_in), weight (d_out, d_in), bias (d_out,) -> (..., d_out); see the reference."""
    if not torch.is_grad_enabled() and 0 < x.numel() <= _FEW * x.shape[-1] and _readable(x, weight):
        y = torch.ops.ssmoe.skinny_linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    if not _ONEDNN or x.dtype != torch.float32 or x.numel() * weight.shape[0] < _SMALL:
        return torch_linear(x, weight, bias)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return cast(Tensor, _Linear.apply(x, weight, bias))


def _readable(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes the weights as they lie."""
    return weight.dtype == x.dtype and x.dtype in _KERNEL and weight.is_contiguous()


def _skinny_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


torch.library.register_fake("ssmoe::skinny_linear", _skinny_fake)


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left (m, k) right^T (k, n) + bias"""
    return torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """A copy of a matrix with gaps between rows, which oneDNN would multiply 100 times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None
        return _product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = grad_outputs[0].reshape(-1, weight.shape[0])
        rows = x.reshape(-1, x.shape[-1])
        return (
            _product(dy, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None,
            _product(dy.t(), rows.t()) if ctx.needs_input_grad[1] else None,
            dy.sum(0) if ctx.with_bias else None,
        )
