"""The matrix product on the CPU: `ssmoe.ops.reference.linear`, by whatever is the fastest here.

A few rows without gradients go through `csrc/skinny.h`, which reads the weights at the speed of memory.

torch's float32 product is MKL's, which reaches 40 % of an AMD core where oneDNN, in the same torch, reaches
90 %; bfloat16 is oneDNN's in either, and float64 is left to torch. On AVX-512 our own products
(`csrc/dense.h`) join in where the libraries lose: gradients of weights, whose operands lie transposed, and
float32 weights under bfloat16 activations, which are narrowed while they are packed and whose gradients come
in float32.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ssmoe.ops.cpu.state import any_gradient
from ssmoe.ops.reference.linear import linear as torch_linear

# measured once for the expert bank too (csrc/experts.cpp)
_ONEDNN = str(torch.ops.ssmoe.cpu_products()) == "oneDNN"

_LEVEL = str(torch.ops.ssmoe.cpu_level())

OWN = _LEVEL.startswith("Avx512")
"""Whether our own products keep up with the libraries' at this level of instructions."""

_OWN_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)[: 2 if _LEVEL == "Avx512Bf16" else OWN]

_SMALL = 1 << 21
"""Multiply-adds below which a call through autograd in Python, about 20 us more than torch's, costs more than
it saves."""


_FEW = 8
"""Rows up to which reading the weights once and in order is what counts."""

_KERNEL = (torch.float32, torch.bfloat16, torch.float64)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., d_in), weight (d_out, d_in), bias (d_out,) -> (..., d_out); see the reference."""
    if not torch.is_grad_enabled() and 0 < x.numel() <= _FEW * x.shape[-1] and _readable(x, weight):
        y = torch.ops.ssmoe.skinny_linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    if x.numel() * weight.shape[0] < _SMALL or not (x.dtype in _OWN_DTYPES or _onednn(x.dtype)):
        return torch_linear(x, weight, bias)
    if x.dtype not in _OWN_DTYPES or weight.dtype not in (x.dtype, torch.float32):
        weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if any_gradient(x, weight, bias):
        return cast(Tensor, _Linear.apply(x, weight, bias))
    return _apply(x, weight, bias)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _onednn(dtype: torch.dtype) -> bool:
    return _ONEDNN and dtype == torch.float32


def _readable(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes the weights as they lie."""
    return weight.dtype == x.dtype and x.dtype in _KERNEL and weight.is_contiguous()


def _skinny_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


torch.library.register_fake("ssmoe::skinny_linear", _skinny_fake)


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left (m, k) right^T (k, n) + bias in left's dtype"""
    if left.dtype != right.dtype or not _onednn(left.dtype):
        y = torch.ops.ssmoe.product(left, right.t(), False)
        return y if bias is None else y.add_(bias)
    if torch.compiler.is_compiling():  # torch's compiler wants the other one's operands in forms of its own
        y = left @ right.t()
        return y if bias is None else y + bias
    return torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right), bias, "none", [], "")


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T (d_out, t) x (t, d_in) in the weight's dtype"""
    if x.dtype in _OWN_DTYPES:
        return torch.ops.ssmoe.product(dy.t(), x, dtype == torch.float32)
    return _product(dy.t(), x.t())


def _dense(matrix: Tensor) -> Tensor:
    """A copy of a matrix with gaps between rows, which oneDNN would multiply 100 times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None
        return _apply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = grad_outputs[0].reshape(-1, weight.shape[0])
        rows = x.reshape(-1, x.shape[-1])
        return (
            _product(dy, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None,
            _weight_gradient(dy, rows, weight.dtype) if ctx.needs_input_grad[1] else None,
            dy.sum(0) if ctx.with_bias else None,
        )


def _fake(a: Tensor, b: Tensor, wide: bool) -> Tensor:
    narrow = torch.bfloat16 if torch.bfloat16 in (a.dtype, b.dtype) else a.dtype
    dtype = torch.promote_types(narrow, torch.float32) if wide else narrow
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


torch.library.register_fake("ssmoe::product", _fake)


def split_linear(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """x (..., d_in), weight (sum(sizes), d_in) -> pieces (..., size); see the reference."""
    return tuple(torch.split(linear(x, weight), list(sizes), dim=-1))


def fork_linear(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., d_in), weight (d_out, d_in) -> (x, (..., d_out)); see the reference."""
    return x, linear(x, weight)
