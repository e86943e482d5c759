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


def cross_entropy(logits: Tensor, targets: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """`ssmoe.ops.reference.cross_entropy` for float32 and bfloat16; the gradient takes the logits' place."""
    check_activations(logits=logits)
    t, vocab = logits.shape
    check_shape(targets=(targets, (t,)))
    logits = row_major(logits.detach())
    loss = torch.empty(t, dtype=torch.float32, device=logits.device)
    if t:
        block = min(8192, triton.next_power_of_2(vocab))
        with on_device(logits):
            cross_entropy_kernel[(t,)](
                logits, targets.contiguous(), loss, vocab, logits.stride(0), IGNORE=IGNORE, GRADIENT=gradient,
                BLOCK=block, num_warps=8 if block > 2048 else 4,
            )  # fmt: skip
    return loss, logits if gradient else None


@triton.jit
def cross_entropy_kernel(
    logits, targets, loss, vocab, stride, IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    real = target != IGNORE
    base = logits + row * stride
    lane = tl.arange(0, BLOCK)
    # the maximum so far is one number, so that each logit costs one exponential
    top = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, vocab, BLOCK):
        value = tl.load(base + begin + lane, mask=begin + lane < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(value, axis=0))
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
    log_total = tl.log(tl.sum(total, axis=0))
    # two differences: their sum would round away what a large maximum hides
    log_p = tl.load(base + tl.where(real, target, 0)).to(tl.float32) - top - log_total
    tl.store(loss + row, tl.where(real, -log_p, 0.0))
    if GRADIENT:
        # exp(log_p) - 1 by its series where the difference would lose the small value
        series = log_p * (1 + log_p * (0.5 + log_p * (1 / 6 + log_p / 24)))
        at_target = tl.where(log_p > -0.03, series, tl.exp(log_p) - 1)
        for begin in range(0, vocab, BLOCK):
            column = begin + lane
            value = tl.load(base + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
            slope = tl.where(column == target, at_target, tl.exp(value - top - log_total))
            tl.store(base + column, tl.where(real, slope, 0.0), mask=column < vocab)
