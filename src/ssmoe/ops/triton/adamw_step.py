"""AdamW's update on a GPU: every value is read once and written once, and gradients are only read."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from collections.abc import Sequence
from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.triton.launch import on_device

BLOCK = 1024
WARPS = 4


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    scale: Tensor | None = None,
) -> None:
    """`ssmoe.ops.reference.adamw_step` for contiguous float32 and gradients of any float; one launch a parameter."""
    for kind in (parameters, means, squares):
        if wrong := {t.dtype for t in kind} - {torch.float32}:
            raise ValueError(f"adamw_step got {wrong.pop()}: the triton backend takes float32")
    beta1, beta2 = betas
    for parameter, gradient, mean, square, step in zip(
        parameters, gradients, means, squares, steps, strict=True
    ):
        if not (parameter.is_contiguous() and mean.is_contiguous() and square.is_contiguous()):
            raise ValueError("adamw_step takes contiguous parameters and states: make them so")
        n = parameter.numel()
        if not n:
            continue
        with on_device(parameter):
            adamw_kernel[(triton.cdiv(n, BLOCK),)](
                parameter, gradient.contiguous(), mean, square, step, rate, step if scale is None else scale, n,
                log(beta1) if beta1 else -1e4, log(beta2) if beta2 else -1e4, 1 - beta1, 1 - beta2, beta2, eps, decay,
                HELD=isinstance(rate, Tensor), SCALED=scale is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip


@triton.jit
def adamw_kernel(
    parameter, gradient, mean, square, step, rate, scale, n, log1, log2, rest1, rest2, beta2, eps, decay,
    HELD: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log1, log2: of the betas; rest1, rest2: 1 less them. HELD: `rate` is in memory."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(square + at, mask=inside, other=0.0)
    value = tl.load(parameter + at, mask=inside, other=0.0)
    count = tl.load(step).to(tl.float64)
    if HELD:
        rate = tl.load(rate)
    if SCALED:
        slope /= tl.load(scale)
    # in float32 the difference would keep four digits
    first = (1 - tl.exp(count * log1)).to(tl.float32)
    second = (1 - tl.exp(count * log2)).to(tl.float32)
    m += rest1 * (slope - m)
    v = v * beta2 + rest2 * slope * slope
    value *= 1 - rate * decay
    value -= rate / first * m / (tl.sqrt(v) / tl.sqrt(second) + eps)
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(parameter + at, value, mask=inside)
