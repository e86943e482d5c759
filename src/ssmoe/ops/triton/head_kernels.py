"""The head's products and cross-entropy without a pass over the logits, on a Hopper GPU in bfloat16.

With c a number near a row's largest logit, the product of x and the weight leaves powers e = exp(logit - c) instead of
logits, and of each tile the sums of its rows. A softmax is then e / S with S the sum of a row, and dividing by S needs
no pass over e: the gradient of x is (e W) / S, that of the weight is e^T (x / S). One value of a row is written anew:
its target's, (p - 1) S. c comes from a few columns, so a row may yet leave the range of powers: its own powers are
then taken again, of its largest logit. e is rounded as a gradient of logits would be, the logits are not.
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ssmoe.ops.reference.cross_entropy import IGNORE
from ssmoe.ops.triton.launch import on_device

ROWS, COLUMNS, DEPTH, WARPS, STAGES = 128, 256, 64, 8, 3
SAMPLE = 128
"""Columns whose largest logit is c."""
MANY = 16
"""Rows of a program of `finish_kernel`."""
SHORTEST = 8192
"""Columns: shorter rows are not worth it."""
EXTRA = 16
"""Columns beside x / S, the first three 1 / S in parts, so that the weight's product makes the bias's gradient too; with
16 it is faster than with 8 or 32."""
PARTS = tl.constexpr(3)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)
FEWEST, MOST = tl.constexpr(1e-3), tl.constexpr(1e30)
"""Between these a row's sum leaves nothing out of range."""


def covers(x: Tensor, width: int) -> bool:
    """Whether x (t, d) and rows of `width` logits suit the kernels."""
    if torch.compiler.is_compiling():
        return False
    fits = x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0] > 0 and x.shape[1] % DEPTH == 0
    return fits and x.is_contiguous() and width >= SHORTEST and width % 8 == 0 and _is_hopper(x.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def shifts(bias: Tensor | None, vocab: int, device: torch.device) -> Tensor:
    """What is added to logits in units of log 2, (a multiple of `COLUMNS`,): the bias, and -inf past the vocabulary."""
    out = torch.full((-(-vocab // COLUMNS) * COLUMNS,), float("-inf"), dtype=torch.float32, device=device)
    if bias is None:
        out[:vocab] = 0
    else:
        torch.mul(bias, LOG2E.value, out=out[:vocab])
    return out


def near_tops(x: Tensor, weight: Tensor, shift: Tensor, vocab: int) -> Tensor:
    """(t,): the largest of a few logits of every row, in units of log 2."""
    (t, d), out = x.shape, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    with on_device(x):
        tops_kernel[(triton.cdiv(t, 128),)](
            x, weight, shift, out, t, d, max(1, vocab // SAMPLE), vocab, BM=128, BN=SAMPLE, BK=64,
            CAST=tl.bfloat16 if x.is_cuda else tl.float32, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out


def powers(x: Tensor, weight: Tensor, shift: Tensor, top: Tensor, out: Tensor) -> Tensor:
    """out (t, width) = exp(logit - c) of x (t, d), weight (width, d); returned are its tiles' sums, (tiles, t)."""
    (t, d), width = x.shape, weight.shape[0]
    sums = torch.empty(triton.cdiv(width, COLUMNS), t, dtype=torch.float32, device=x.device)
    with on_device(x):
        powers_kernel[(_programs(x.device),)](
            TensorDescriptor.from_tensor(x, [ROWS, DEPTH]), TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH]),
            TensorDescriptor.from_tensor(out, [ROWS, COLUMNS // 2]), shift, top, sums, t, width, d,
            BM=ROWS, BN=COLUMNS, BK=DEPTH, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return sums


def finish(
    x: Tensor, weight: Tensor, shift: Tensor, top: Tensor, sums: Tensor, targets: Tensor, out: Tensor, vocab: int,
    loss: Tensor, inverse: Tensor, scaled: Tensor,
) -> None:  # fmt: skip
    """Write loss, inverse (t,) = 1 / S, zero without a target, and scaled (t, d + `EXTRA`); correct the powers `out`."""
    (t, d), tiles = x.shape, sums.shape[0]
    with on_device(x):
        finish_kernel[(triton.cdiv(t, MANY),)](
            x, weight, shift, top, sums, targets, out, loss, inverse, scaled, t, d, tiles, vocab, out.shape[1],
            IGNORE=IGNORE, EXTRA=EXTRA, MANY=MANY, TILES=32, BK=128, BN=64, num_warps=4,
        )  # fmt: skip


@triton.jit
def tops_kernel(
    x, weight, shift, out, T, K, step, vocab, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    CAST: tl.constexpr,
):  # fmt: skip
    """Every step-th column, of BM rows. CAST: what the interpreter multiplies."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.minimum(tl.arange(0, BN) * step, vocab - 1)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, K, BK):
        left = tl.load(x + row[:, None] * K + begin + k[None, :], mask=(row < T)[:, None], other=0.0)
        right = tl.load(weight + column[None, :].to(tl.int64) * K + begin + k[:, None])
        acc = tl.dot(left.to(CAST), right.to(CAST), acc, input_precision="ieee")
    top = tl.max(acc * LOG2E + tl.load(shift + column)[None, :], axis=1)
    tl.store(out + row, tl.maximum(top, LOWEST), mask=row < T)


@triton.jit
def powers_kernel(
    x, weight, out, shift, top, sums, T, width, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Persistent programs take tile after tile of BM rows and BN columns. x, weight and out are descriptors."""
    down = tl.cdiv(T, BM)
    for tile in tl.range(tl.program_id(0), down * tl.cdiv(width, BN), tl.num_programs(0), flatten=True):
        row, column = (tile % down) * BM, (tile // down) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for begin in tl.range(0, K, BK):
            acc = tl.dot(x.load([row, begin]), weight.load([column, begin]).T, acc)
        rows = row + tl.arange(0, BM)
        c = tl.load(top + rows, mask=rows < T, other=0.0)[:, None]
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        n = column + tl.arange(0, BN // 2)
        left = tl.exp2(left * LOG2E + (tl.load(shift + n)[None, :] - c))
        out.store([row, column], left.to(tl.bfloat16))
        right = tl.exp2(right * LOG2E + (tl.load(shift + BN // 2 + n)[None, :] - c))
        out.store([row, column + BN // 2], right.to(tl.bfloat16))
        total = tl.sum(left, axis=1) + tl.sum(right, axis=1)
        tl.store(sums + (tile // down).to(tl.int64) * T + rows, total, mask=rows < T)


@triton.jit
def logits_of(x, weight, shift, row, begin, K, vocab, BN: tl.constexpr, BK: tl.constexpr):
    """BN logits of one row from column `begin` on, in units of log 2; -inf past the vocabulary."""
    n = begin + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        at = weight + n[:, None].to(tl.int64) * K + k[None, :]
        right = tl.load(at, mask=(n < vocab)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(left[None, :] * right, axis=1)
    return total * LOG2E + tl.load(shift + n, mask=n < vocab, other=float("-inf"))


@triton.jit
def take_again(x, weight, shift, out, row, real, K, vocab, width, BN: tl.constexpr, BK: tl.constexpr):
    """A row's powers of its largest logit, over those that left their range; their sum and that logit."""
    top = tl.full((), LOWEST, tl.float32)
    for begin in range(0, width, BN):
        top = tl.maximum(top, tl.max(logits_of(x, weight, shift, row, begin, K, vocab, BN, BK), axis=0))
    total = tl.zeros((), tl.float32)
    for begin in range(0, width, BN):
        value = tl.exp2(logits_of(x, weight, shift, row, begin, K, vocab, BN, BK) - top)
        total += tl.sum(value, axis=0)
        n = begin + tl.arange(0, BN)
        # nothing of a row without a target may reach the others
        tl.store(out + row * width + n, tl.where(real, value, 0.0).to(out.dtype.element_ty), mask=n < width)
    return total, top


@triton.jit
def finish_kernel(
    x, weight, shift, top, sums, targets, out, loss, inverse, scaled, T, K, tiles, vocab, width,
    IGNORE: tl.constexpr, EXTRA: tl.constexpr, MANY: tl.constexpr, TILES: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * MANY
    row = first + tl.arange(0, MANY)
    live = row < T
    total = tl.zeros((MANY,), tl.float32)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        at = sums + tile[:, None].to(tl.int64) * T + row[None, :]
        total += tl.sum(tl.load(at, mask=(tile < tiles)[:, None] & live[None, :], other=0.0), axis=0)
    target = tl.load(targets + row, mask=live, other=IGNORE)
    real = target != IGNORE
    c = tl.load(top + row, mask=live, other=0.0)
    # False for what is no number, too
    wild = live & ((total > FEWEST) & (total < MOST) == 0)
    if tl.max(wild.to(tl.int32), axis=0) > 0:
        for i in range(MANY):
            this = tl.arange(0, MANY) == i
            if tl.sum((this & wild).to(tl.int32), axis=0) > 0:
                wanted = tl.sum((this & real).to(tl.int32), axis=0) > 0
                sum2, top2 = take_again(x, weight, shift, out, first + i, wanted, K, vocab, width, BN, BK)
                total, c = tl.where(this, sum2, total), tl.where(this, top2, c)
        tl.debug_barrier()
    safe = tl.where(real, target, 0)
    factor = tl.where(real, 1 / total, 0.0)
    logit = tl.zeros((MANY,), tl.float32)
    for begin in range(0, K, BK):
        k = begin + tl.arange(0, BK)
        inside = live[:, None] & (k < K)[None, :]
        value = tl.load(x + row[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        its = tl.load(weight + safe[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        logit += tl.sum(value * its, axis=1)
        at = scaled + row[:, None] * (K + EXTRA) + k[None, :]
        tl.store(at, tl.where(real[:, None], value * factor[:, None], 0.0).to(tl.bfloat16), mask=inside)
    log_p = (logit * LOG2E + tl.load(shift + safe) - c - tl.log2(total)) / LOG2E
    tl.store(loss + row, tl.where(real, -log_p, 0.0), mask=live)
    tl.store(inverse + row, factor, mask=live)
    # exp(log_p) - 1 by its series where the difference would lose the small value
    series = log_p * (1 + log_p * (0.5 + log_p * (1 / 6 + log_p / 24)))
    slope = tl.where(log_p > -0.03, series, tl.exp(log_p) - 1)
    tl.store(out + row * width + safe, (slope * total).to(out.dtype.element_ty), mask=live & real)
    for i in tl.static_range(EXTRA):
        part = factor.to(tl.bfloat16)
        if i >= PARTS:
            part = tl.zeros((MANY,), tl.bfloat16)
        tl.store(scaled + row * (K + EXTRA) + K + i, part, mask=live)
        factor -= part.to(tl.float32)
