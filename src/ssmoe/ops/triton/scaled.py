"""A tensor times a number that lies in memory, in another dtype: one pass at a GPU's memory speed."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.triton.launch import on_device, some

BLOCK = 1024


@torch.library.custom_op("ssmoe::scaled", mutates_args=())
def scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (...) times scale (), multiplied in float32, in `dtype`; without a scale x alone."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        with on_device(x):
            scaled_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, *some(x, scale), out, x.numel(), SCALED=scale is not None, BLOCK=BLOCK, num_warps=4
            )
    return out


@scaled.register_fake
def _(x, scale, dtype):  # noqa: ARG001
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@triton.jit
def scaled_kernel(x, scale, out, count, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(scale).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)
