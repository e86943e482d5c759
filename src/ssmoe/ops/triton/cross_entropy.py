"""Cross-entropy and its gradient on a GPU: a row's logits are read twice, once from cache, and overwritten."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.reference.cross_entropy import IGNORE
from ssmoe.ops.triton.launch import check_activations, check_shape, on_device, row_major

LOWEST = tl.constexpr(-3.4e38)
"""In place of -inf, whose difference with itself is no number."""


SAFE = tl.constexpr(60.0)
"""exp of this, times a vocabulary, is far from overflow."""
BLOCK = 2048
WARPS = 4
LOG2E = tl.constexpr(1.4426950408889634)


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


def overwrite(logits: Tensor, targets: Tensor, loss: Tensor, vocab: int, *, gradient: bool) -> None:
    """Write each row's loss (t,) and, over logits (t, width), its gradient: zero from column `vocab` on."""
    t, width = logits.shape
    if not t:
        return
    block = min(BLOCK, triton.next_power_of_2(width))
    with on_device(logits):
        cross_entropy_kernel[(t,)](
            logits, targets.contiguous(), loss, vocab, width, logits.stride(0), IGNORE=IGNORE, GRADIENT=gradient,
            BLOCK=block, num_warps=WARPS,
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
def cross_entropy_kernel(
    logits, targets, loss, vocab, width, stride, IGNORE: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
        at_target = tl.where(log_p > -0.03, series, tl.exp(log_p) - 1)
        # of a row without a target nothing is left
        log2_total = tl.where(real, log_total * LOG2E, float("inf"))
        for begin in range(0, width, BLOCK):
            column = begin + lane
            value = tl.load(base + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
            tl.store(base + column, tl.exp2((value - top) * LOG2E - log2_total), mask=column < width)
        tl.debug_barrier()
        tl.store(base + target, at_target, mask=real)
