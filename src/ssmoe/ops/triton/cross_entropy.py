"""Cross-entropy and its gradient on a GPU: one kernel reads rows of logits, another puts the gradient in their place.

The second works on blocks of columns, so that it also adds them up, which is a bias's gradient. Where
`cross_entropy_cuda.covers` the rows, one kernel in CUDA C++ does both.
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.reference.cross_entropy import IGNORE
from ssmoe.ops.triton import cross_entropy_cuda as cuda
from ssmoe.ops.triton.launch import check_activations, check_shape, on_device, row_major

LOWEST = tl.constexpr(-3.4e38)
"""In place of -inf, whose difference with itself is no number."""


SAFE = tl.constexpr(60.0)
"""exp of this, times a vocabulary, is far from overflow."""
BLOCK = 2048
WARPS = 4
LOG2E = tl.constexpr(1.4426950408889634)
# the gradient: columns and rows of a tile, rows of a program
COLUMNS = 1024
ROWS = 4
SPAN = 256
SLOPE_WARPS = 4


def cross_entropy(logits: Tensor, targets: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """`ssmoe.ops.reference.cross_entropy` for float32 and bfloat16; the gradient takes the logits' place."""
    check(logits, targets)
    logits = row_major(logits.detach())
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    overwrite(logits, targets, loss, logits.shape[1], gradient=gradient)
    return loss, logits if gradient else None


def check(rows: Tensor, targets: Tensor) -> None:
    """Raise ValueError for what the kernel does not take."""
    check_activations(rows=rows)
    check_shape(targets=(targets, rows.shape[:1]))


def sums_of(logits: Tensor) -> Tensor:
    """Zeros for what `overwrite` adds to: so many sums of every column of logits (t, width)."""
    t, width = logits.shape
    count = cuda.clusters(logits.device) if cuda.covers(logits) else triton.cdiv(t, SPAN)
    return torch.zeros(count, width, dtype=torch.float32, device=logits.device)


def overwrite(
    logits: Tensor, targets: Tensor, loss: Tensor, vocab: int, *, gradient: bool, sums: Tensor | None = None
) -> None:
    """Write each row's loss (t,) and, over logits (t, width), its gradient: zero from column `vocab` on.

    sums: what `sums_of` made for at least as many rows; the gradient's columns are added to its rows.
    """
    t, width = logits.shape
    if not t:
        return
    targets = targets.contiguous()
    if gradient and cuda.covers(logits):
        cuda.overwrite(logits, targets, loss, vocab, sums)
        return
    rows = torch.empty((3, t) if gradient else (0,), dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    with on_device(logits):
        loss_kernel[(t,)](
            logits, targets, loss, rows, t, vocab, logits.stride(0), IGNORE=IGNORE, GRADIENT=gradient, BLOCK=block,
            num_warps=WARPS,
        )  # fmt: skip
        if gradient:
            columns = min(COLUMNS, triton.next_power_of_2(width))
            slope_kernel[(triton.cdiv(width, columns), triton.cdiv(t, SPAN))](
                logits, targets, rows, rows if sums is None else sums, t, vocab, width, logits.stride(0),
                IGNORE=IGNORE, SUMS=sums is not None, ROWS=ROWS, SPAN=SPAN, BLOCK=columns, num_warps=SLOPE_WARPS,
            )  # fmt: skip


@triton.jit
def powers(base, vocab, shift, BLOCK: tl.constexpr):
    """Sum of exp(logit - shift) and the largest logit. Nothing in the loop waits for other lanes."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    for begin in range(0, vocab, BLOCK):
        value = tl.load(base + begin + lane, mask=begin + lane < vocab, other=float("-inf")).to(tl.float32)
        total += tl.exp(value - shift)
        top = tl.maximum(top, value)
    return tl.sum(total, axis=0), tl.max(top, axis=0)


@triton.jit
def loss_kernel(
    logits, targets, loss, rows, t, vocab, stride, IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row's loss and, for its gradient, rows (3, t): the largest logit, what to divide by, the target's slope."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    real = target != IGNORE
    base = logits + row * stride
    lane = tl.arange(0, BLOCK)
    # the first block's largest logit is near enough to the row's, as a rule, to keep powers in range
    first = tl.load(base + lane, mask=lane < vocab, other=float("-inf")).to(tl.float32)
    shift = tl.maximum(tl.max(first, axis=0), LOWEST)
    total, top = powers(base, vocab, shift, BLOCK)
    if top - shift > SAFE:
        total, top = powers(base, vocab, top, BLOCK)
        shift = top
    # of the largest, so that the logarithm of a row with one likely token is exact
    log_total = tl.log(total * tl.exp(shift - top))
    # two differences: their sum would round away what a large maximum hides
    log_p = tl.load(base + tl.where(real, target, 0)).to(tl.float32) - top - log_total
    tl.store(loss + row, tl.where(real, -log_p, 0.0))
    if GRADIENT:
        # exp(log_p) - 1 by its series where the difference would lose the small value
        series = log_p * (1 + log_p * (0.5 + log_p * (1 / 6 + log_p / 24)))
        tl.store(rows + row, top)
        # of a row without a target nothing is left
        tl.store(rows + t + row, tl.where(real, log_total * LOG2E, float("inf")))
        tl.store(rows + 2 * t + row, tl.where(log_p > -0.03, series, tl.exp(log_p) - 1))


@triton.jit
def slope_kernel(
    logits, targets, rows, sums, t, vocab, width, stride, IGNORE: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SPAN rows of BLOCK columns: softmax, less one at the target, in place of the logits."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(group * SPAN, tl.minimum((group + 1) * SPAN, t), ROWS):
        row = begin + tl.arange(0, ROWS)
        live = row < t
        target = tl.load(targets + row, mask=live, other=IGNORE)
        top = tl.load(rows + row, mask=live, other=0.0)
        log2_total = tl.load(rows + t + row, mask=live, other=float("inf"))
        at_target = tl.load(rows + 2 * t + row, mask=live, other=0.0)
        at = logits + row.to(tl.int64)[:, None] * stride + column[None, :]
        value = tl.load(at, mask=live[:, None] & (column < vocab)[None, :], other=float("-inf")).to(
            tl.float32
        )
        slope = tl.exp2((value - top[:, None]) * LOG2E - log2_total[:, None])
        slope = tl.where(column[None, :] == target[:, None], at_target[:, None], slope)
        tl.store(at, slope, mask=live[:, None] & (column < width)[None, :])
        if SUMS:
            total += tl.sum(slope, axis=0)
    if SUMS:
        at = sums + group * width + column
        tl.store(at, tl.load(at, mask=column < width, other=0.0) + total, mask=column < width)
