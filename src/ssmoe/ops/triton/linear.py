"""Projections on a GPU: torch's products; the gradient of a float32 weight comes out of its product as float32."""
# autograd calls what it was given
# pyright: basic

import torch
from torch import Tensor

from ssmoe.ops.reference.linear import linear as torch_linear
from ssmoe.ops.triton.launch import product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., d_in), weight (d_out, d_in), bias (d_out,) -> (..., d_out); see the reference."""
    differentiable = torch.is_grad_enabled() and weight.requires_grad
    if bias is not None or x.dtype != torch.bfloat16 or weight.dtype != torch.float32 or not differentiable:
        return torch_linear(x, weight, bias)
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, narrow)
        return torch.nn.functional.linear(x, narrow)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = (rows @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, product(rows.t(), x.reshape(-1, x.shape[-1]), torch.float32)
