"""Muon's update on a GPU: cuBLAS for two of the three products of a pass, one kernel for everything between."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from collections.abc import Sequence
from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.reference.muon_step import MATCH_ADAMW, SMALLEST, Iteration
from ssmoe.ops.triton.launch import on_device

DTYPE = torch.bfloat16
"""Of the products; the interpreter, which cannot multiply bfloat16, sets float32."""
BLOCK = 4096
TILE = 128


def muon_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    rate: float | Tensor,
    decay: float,
    mu: float,
    iteration: Iteration,
) -> None:
    """`ssmoe.ops.reference.muon_step` for float32 parameters."""
    first = parameters[0]
    if wrong := {t.dtype for t in (*parameters, *gradients, *momenta)} - {torch.float32}:
        raise ValueError(f"muon_step got {wrong.pop()}: the triton backend takes float32")
    sizes = [parameter.shape[0] for parameter in parameters]
    x = torch.empty((sum(sizes), *first.shape[1:]), dtype=DTYPE, device=first.device)
    with on_device(first):
        for piece, gradient, momentum in zip(torch.split(x, sizes), gradients, momenta, strict=True):
            n = piece.numel()
            mix_kernel[(triton.cdiv(n, BLOCK),)](momentum, gradient.contiguous(), piece, n, mu, BLOCK=BLOCK)
        x = orthogonalise(x, iteration)
        factor, held = MATCH_ADAMW * sqrt(max(first.shape[1:])), isinstance(rate, Tensor)
        for piece, parameter in zip(torch.split(x, sizes), parameters, strict=True):
            n = piece.numel()
            apply_kernel[(triton.cdiv(n, BLOCK),)](
                parameter, piece, rate, n, decay, factor, HELD=held, BLOCK=BLOCK
            )


def orthogonalise(x: Tensor, iteration: Iteration) -> Tensor:
    """As the reference, but with a I + b A + c A^2 as one matrix, so that X <- that times X is a plain product."""
    tall = x.shape[1] > x.shape[2]
    n, size = x.shape[0], min(x.shape[1:])
    scale = torch.empty(n, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(size, TILE)
    for i, (a, b, c) in enumerate(iteration.coefficients):
        gram = x.mT @ x if tall else x @ x.mT
        if i == 0:
            bound_kernel[(n,)](gram, scale, size, SMALLEST**2, TIGHT=iteration.tight, BLOCK=BLOCK)
        factor = torch.empty_like(gram)
        factor_kernel[(tiles * (tiles + 1) // 2, n)](
            gram, factor, scale, size, a, b, c, SCALED=i == 0, TILE=TILE, DEPTH=64, num_warps=8
        )
        x = x @ factor if tall else factor @ x
    return x


@triton.jit
def mix_kernel(momentum, gradient, x, size, mu, BLOCK: tl.constexpr):
    """momentum <- mu momentum + (1 - mu) gradient; x = mu momentum + (1 - mu) gradient; all dense."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    g = tl.load(gradient + i, mask=inside)
    m = tl.load(momentum + i, mask=inside)
    m += (1 - mu) * (g - m)
    tl.store(momentum + i, m, mask=inside)
    m += (1 - mu) * (g - m)
    tl.store(x + i, m.to(x.dtype.element_ty), mask=inside)


@triton.jit
def apply_kernel(parameter, x, rate, size, decay, factor, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """parameter <- (1 - rate decay) parameter - rate factor x; HELD: the rate lies in memory."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    if HELD:
        rate = tl.load(rate)
    p = tl.load(parameter + i, mask=inside)
    step = rate * (decay * p + factor * tl.load(x + i, mask=inside).to(tl.float32))
    tl.store(parameter + i, p - step, mask=inside)


@triton.jit
def bound_kernel(gram, scale, size, smallest, TIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """1 / root of a bound on the largest eigenvalue of gram (n, size, size): its norm (TIGHT) or trace."""
    n = tl.program_id(0).to(tl.int64)
    gram += n * size * size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, size * size if TIGHT else size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        if TIGHT:
            value = tl.load(gram + i, mask=i < size * size, other=0.0).to(tl.float32)
            total += value * value
        else:
            total += tl.load(gram + i * (size + 1), mask=i < size, other=0.0).to(tl.float32)
    bound = tl.sum(total)
    if TIGHT:
        bound = tl.sqrt(bound)
    tl.store(scale + n, 1 / tl.sqrt(tl.maximum(bound, smallest)))


@triton.jit
def factor_kernel(
    gram, factor, scale, size, a, b, c, SCALED: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """a I + b A + c A A of A = gram (n, size, size), symmetric: tiles on and under the diagonal, mirrored.

    SCALED: A = scale^2 gram, and the result times scale.
    """
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    down = 0
    while (down + 1) * (down + 2) // 2 <= tile:
        down += 1
    rows = down * TILE + tl.arange(0, TILE)
    across = tile - down * (down + 1) // 2
    columns = across * TILE + tl.arange(0, TILE)
    gram += n * size * size
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for begin in range(0, size, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        left = tl.load(
            gram + rows[:, None] * size + k[None, :],
            mask=(rows[:, None] < size) & (k[None, :] < size),
            other=0.0,
        )
        # symmetric, so that a row is a column
        right = tl.load(
            gram + columns[None, :] * size + k[:, None],
            mask=(columns[None, :] < size) & (k[:, None] < size),
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    place = rows[:, None] * size + columns[None, :]
    inside = (rows[:, None] < size) & (columns[None, :] < size)
    itself = tl.load(gram + place, mask=inside, other=0.0).to(tl.float32)
    one = tl.where(rows[:, None] == columns[None, :], a, 0.0)
    if SCALED:
        s = tl.load(scale + n)
        y = s * (one + s * s * (b * itself + s * s * (c * total)))
    else:
        y = one + b * itself + c * total
    y = y.to(factor.dtype.element_ty)
    factor += n * size * size
    tl.store(factor + place, y, mask=inside)
    if down != across:
        tl.store(factor + columns[None, :] * size + rows[:, None], y, mask=inside)
