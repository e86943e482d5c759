"""The end of the residual stream on a GPU: a sum and its narrowing in one pass, and one pass back."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.reference.residual_sum import residual_sum as torch_residual_sum
from ssmoe.ops.triton.launch import check_activations, check_shape, direct, on_device
from ssmoe.ops.triton.scaled import scaled

BLOCK = 1024


def residual_sum(x: Tensor, add: Tensor, *, dtype: torch.dtype) -> Tensor:
    """`ssmoe.ops.reference.residual_sum`; one pass for a float32 x, a bfloat16 `add` and a bfloat16 result."""
    check_activations(x=x, add=add)
    check_shape(add=(add, tuple(x.shape)))
    if (x.dtype, add.dtype, dtype) != (torch.float32, torch.bfloat16, torch.bfloat16):
        return torch_residual_sum(x, add, dtype=dtype)
    return _ResidualSum.apply(x, add)


class _ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, add):  # noqa: ARG004
        return direct(sum_forward, x)(x, add)

    @staticmethod
    def backward(ctx, dy):
        return scaled(dy, None, torch.float32) if ctx.needs_input_grad[0] else None, dy


@torch.library.custom_op("ssmoe::sum_forward", mutates_args=())
def sum_forward(x: Tensor, add: Tensor) -> Tensor:
    """x + add in add's dtype."""
    x, add = x.contiguous(), add.contiguous()
    out = torch.empty(x.shape, dtype=add.dtype, device=x.device)
    with on_device(x):
        sum_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, add, out, x.numel(), BLOCK=BLOCK, num_warps=4)
    return out


@sum_forward.register_fake
def _(x, add):
    return torch.empty(x.shape, dtype=add.dtype, device=x.device)


@triton.jit
def sum_kernel(x, add, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + at, mask=at < count, other=0.0) + tl.load(add + at, mask=at < count, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)
