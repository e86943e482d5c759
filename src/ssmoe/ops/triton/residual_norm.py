"""Norm of the residual stream on a GPU: one pass forward, and one backward that adds the stream's gradient."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.triton.column_sums import column_sums
from ssmoe.ops.triton.launch import (
    cdiv,
    check_activations,
    check_shape,
    direct,
    on_device,
    power_of_two,
    some,
)

WIDEST = 16384
CELLS = 512
"""Of the backward, what a warp holds at least, of several rows if need be."""
WARPS = 2112
"""Of the backward at most, each program with its own sum of the weight's gradient: 16 a multiprocessor of an
H100 or H200."""


def residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype,
    add: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmoe.ops.reference.residual_norm` for float32 and bfloat16, up to 16,384 channels; no atomics."""
    check_activations(x=x, add=add)
    check_shape(add=(add, tuple(x.shape)))
    d = x.shape[-1]
    check_shape(weight=(weight, (d,)), bias=(bias, (d,)))
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: the triton backend takes float32 and bfloat16")
    if d > WIDEST:
        raise ValueError(f"x has {d} channels: at most {WIDEST}, or build the model with backend='reference'")
    if add is not None and torch.promote_types(x.dtype, add.dtype) != x.dtype:
        x, add = x + add, None
    if torch.is_grad_enabled():
        return _ResidualNorm.apply(x, weight, bias, add, eps, dtype)
    y, total = direct(norm_forward, x)(x, weight, bias, add, eps, dtype)
    return x if add is None else total, y


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, add, eps, dtype):
        y, total = direct(norm_forward, x)(x, weight, bias, add, eps, dtype)
        total = x.view_as(x) if add is None else total
        ctx.save_for_backward(total, weight, bias)
        ctx.eps, ctx.added = eps, None if add is None else add.dtype
        return total, y

    @staticmethod
    def backward(ctx, dstream, dy):
        x, weight, bias = ctx.saved_tensors
        run = direct(norm_backward, x)
        dx, dadd, sums = run(dstream, dy, x, weight, ctx.eps, bias is not None, ctx.added)
        dbias = None if bias is None else sums[1].to(bias.dtype)
        if ctx.added is not None and not dadd.numel():
            dadd = dx
        return dx, sums[0].to(weight.dtype), dbias, None if ctx.added is None else dadd, None, None


@torch.library.custom_op("ssmoe::norm_forward", mutates_args=())
def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """norm(x + add) in `dtype`, and x + add (empty without `add`)."""
    d = x.shape[-1]
    x = x.contiguous()
    total = x.new_empty(0) if add is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, block = x.numel() // d, power_of_two(d)
    many = max(1, 2048 // block)
    if rows:
        with on_device(x):
            norm_forward_kernel[(cdiv(rows, many),)](
                x, *some(x, weight, bias, add), total, y, rows, d, eps,
                CENTRE=bias is not None, ADD=add is not None, ROWS=many, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    return y, total


@norm_forward.register_fake
def _(x, weight, bias, add, eps, dtype):  # noqa: ARG001
    total = x.new_empty((0,) if add is None else x.shape)
    return torch.empty(x.shape, dtype=dtype, device=x.device), total


@torch.library.custom_op("ssmoe::norm_backward", mutates_args=())
def norm_backward(
    dstream: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    centre: bool,
    narrow: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x, the stream's own included, the same in `narrow` (empty where that is x's dtype or None), and
    those of weight and (with `centre`) bias, (1 or 2, d)."""
    d = x.shape[-1]
    dstream, dy, x = dstream.contiguous(), dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    copied = narrow is not None and narrow != x.dtype
    copy = torch.empty(x.shape, dtype=narrow, device=x.device) if copied else x.new_empty(0)
    rows, block = x.numel() // d, power_of_two(d)
    # a warp has whole rows, so that their sums stay inside it
    many, warps = max(1, CELLS // block), max(1, min(16, block // 1024))
    programs = max(1, min(WARPS // warps, cdiv(rows, many)))
    partial = torch.empty(programs, 2 if centre else 1, d, dtype=torch.float32, device=x.device)
    with on_device(x):
        norm_backward_kernel[(programs,)](
            dstream, dy, x, weight.contiguous(), dx, copy, partial, rows, d, eps, CENTRE=centre, COPY=copied,
            ROWS=many, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dx, copy, column_sums((partial, torch.float32))[0]


@norm_backward.register_fake
def _(dstream, dy, x, weight, eps, centre, narrow):  # noqa: ARG001
    d = x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    copied = narrow is not None and narrow != x.dtype
    copy = dx.new_empty(x.shape if copied else (0,), dtype=narrow or x.dtype)
    return dx, copy, dx.new_empty(2 if centre else 1, d, dtype=torch.float32)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


@triton.jit
def normalised(value, inside, d, eps, CENTRE: tl.constexpr):
    """((x - mean) / deviation, 1 / deviation) of rows, the mean only with CENTRE."""
    if CENTRE:
        mean = tl.sum(value, axis=1) / d
        value = tl.where(inside, value - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(value * value, axis=1) / d + eps)
    return value * scale[:, None], scale


@triton.jit
def norm_forward_kernel(
    x, weight, bias, add, total, y, rows, d, eps,
    CENTRE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (channel < d)[None, :]
    at = row[:, None] * d + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        # as rounded in the stream
        value = (value.to(tl.float32) + tl.load(add + at, mask=inside, other=0.0)).to(x.dtype.element_ty)
        tl.store(total + at, value, mask=inside)
    value, _ = normalised(value.to(tl.float32), inside, d, eps, CENTRE)
    value *= tl.load(weight + channel, mask=channel < d, other=0.0).to(tl.float32)[None, :]
    if CENTRE:
        value += tl.load(bias + channel, mask=channel < d, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, value, mask=inside)


@triton.jit
def cells(tile, rows, channel, d, ROWS: tl.constexpr):
    """Where the rows of a tile lie, and whether they do."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    return row[:, None] * d + channel[None, :], (row < rows)[:, None] & (channel < d)[None, :]


@triton.jit
def norm_backward_kernel(
    dstream, dy, x, weight, dx, copy, partial, rows, d, eps,
    CENTRE: tl.constexpr, COPY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, BLOCK)
    factor = tl.load(weight + channel, mask=channel < d, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    at, inside = cells(program, rows, channel, d, ROWS)
    next_value = tl.load(x + at, mask=inside, other=0.0)
    next_slope = tl.load(dy + at, mask=inside, other=0.0)
    next_stream = tl.load(dstream + at, mask=inside, other=0.0)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        value, slope = next_value.to(tl.float32), next_slope.to(tl.float32)
        stream = next_stream.to(tl.float32)
        # the next rows are on their way while these are worked on
        ahead, there = cells(tile + programs, rows, channel, d, ROWS)
        next_value = tl.load(x + ahead, mask=there, other=0.0)
        next_slope = tl.load(dy + ahead, mask=there, other=0.0)
        next_stream = tl.load(dstream + ahead, mask=there, other=0.0)
        value, scale = normalised(value, inside, d, eps, CENTRE)
        dweight += tl.sum(slope * value, axis=0)
        dbias += tl.sum(slope, axis=0)
        slope *= factor
        change = slope - value * (tl.sum(slope * value, axis=1) / d)[:, None]
        if CENTRE:
            change -= (tl.sum(slope, axis=1) / d)[:, None]
        stream += change * scale[:, None]
        tl.store(dx + at, stream, mask=inside)
        if COPY:
            tl.store(copy + at, stream.to(copy.dtype.element_ty), mask=inside)
        at, inside = ahead, there
    at = partial + program * (d + d if CENTRE else d) + channel
    tl.store(at, dweight, mask=channel < d)
    if CENTRE:
        tl.store(at + d, dbias, mask=channel < d)
