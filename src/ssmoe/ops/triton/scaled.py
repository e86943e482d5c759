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
def scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype, by_row: Tensor | None = None) -> Tensor:
    """x (...) times scale (), multiplied in float32, in `dtype`; without a scale x alone.

    by_row: (t,), what else each row of x (t, d) is multiplied by. The result is dense, x need not be.
    """
    rows = x.ndim == 2 and x.stride(1) == 1 and (by_row is not None or not x.is_contiguous())
    assert rows or by_row is None
    x = x if rows else x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        width, stride = (x.shape[1], x.stride(0)) if rows else (BLOCK, BLOCK)
        with on_device(x):
            scaled_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, *some(x[:0], scale, by_row), out, x.numel(), width, stride,
                SCALED=scale is not None, ROWS=rows, BY_ROW=by_row is not None, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return out


@scaled.register_fake
def _(x, scale, dtype, by_row=None):  # noqa: ARG001
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@triton.jit
def scaled_kernel(
    x, scale, by_row, out, count, width, stride, SCALED: tl.constexpr, ROWS: tl.constexpr, BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS: x has rows of `width` values, `stride` apart."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = at
    if ROWS:
        row = at // width
        place = row * stride + at % width
    value = tl.load(x + place, mask=at < count, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(scale).to(tl.float32)
    if BY_ROW:
        value *= tl.load(by_row + row, mask=at < count, other=0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)
