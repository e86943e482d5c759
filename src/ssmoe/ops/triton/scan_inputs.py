"""Convolution, x_proj and delta_proj in one launch, for inference: a tile of positions stays on its multiprocessor.

x is read once and delta's low-rank factor never leaves the chip.
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.triton.launch import cdiv, on_device, power_of_two, row_major, some


class Tile(NamedTuple):
    """Positions and channels that are convolved together, columns of delta, warps, stages of the second loop."""

    rows: int = 128
    channels: int = 64
    columns: int = 128
    warps: int = 8
    stages: int = 3
    ahead: bool = True


TILE = Tile()


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    x_proj: Tensor,
    delta_proj: Tensor,
    tile: Tile = TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, delta, x_proj of x (b, l, r + 2 n), final state). All but weight, bias in one dtype."""
    b, length, d = x.shape
    k, rank, width = weight.shape[1], delta_proj.shape[1], x_proj.shape[0]
    x = row_major(x)
    y = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    delta = torch.empty_like(y)
    projected = torch.empty(b, length, width, dtype=x.dtype, device=x.device)
    final = torch.empty(b, d, k - 1, dtype=x.dtype, device=x.device)
    with on_device(x):
        scan_inputs_kernel[(b * cdiv(length, tile.rows),)](
            x, *some(x, weight, bias, past, x_proj, delta_proj), y, delta, projected, final, length, x.stride(0),
            d=d, stride_xl=x.stride(1), K=k, RANK=rank, REST=width - rank,
            RANKS=max(16, power_of_two(rank)), RESTS=max(16, power_of_two(width - rank)),
            BM=tile.rows, BK=tile.channels, BN=tile.columns, HAS_BIAS=bias is not None, HAS_INITIAL=past is not None,
            AHEAD=tile.ahead, STAGES=tile.stages, CAST=x.dtype == torch.bfloat16 and not x.is_cuda,
            num_warps=tile.warps,
        )  # fmt: skip
    return y, delta, projected, final


@triton.jit
def rows_of(x, t, channel, length, d, stride, K: tl.constexpr):
    """Rows t - (K - 1) to t of x, as they lie; zero outside."""
    rows = ()
    for j in tl.static_range(K):
        source = t - (K - 1) + j
        keep = ((source >= 0) & (source < length))[:, None] & (channel < d)[None, :]
        rows = rows + (tl.load(x + source[:, None] * stride + channel[None, :], mask=keep, other=0.0),)
    return rows


@triton.jit
def multiplied(a, b, acc, CAST: tl.constexpr):
    """CAST: for the interpreter, which multiplies no bfloat16."""
    if CAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scan_inputs_kernel(
    x, weight, bias, past, x_proj, delta_proj, y, delta, projected, final, length, stride_xb,
    d: tl.constexpr, stride_xl: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, REST: tl.constexpr,
    RANKS: tl.constexpr, RESTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    CAST: tl.constexpr,
):  # fmt: skip
    """BM positions of a row: all channels are convolved and summed up to x_proj's columns, then come delta's."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(length, BM)
    b = (pid // tiles).to(tl.int64)
    first = (pid % tiles) * BM
    t = first + tl.arange(0, BM)
    x += b * stride_xb
    y += b * length * d
    delta += b * length * d
    projected += b * length * (RANK + REST)
    rank, rest = tl.arange(0, RANKS), tl.arange(0, RESTS)
    low = tl.zeros((BM, RANKS), tl.float32)
    both = tl.zeros((BM, RESTS), tl.float32)
    there = t < length
    at = t.to(tl.int64)
    rows = rows_of(x, at, tl.arange(0, BK), length, d, stride_xl, K)
    for begin in tl.range(0, d, BK, num_stages=1):
        channel = begin + tl.arange(0, BK)
        keep = channel < d
        now = rows
        if AHEAD:
            # the next channels are on their way while these are worked on
            rows = rows_of(x, at, channel + BK, length, d, stride_xl, K)
        out = tl.zeros((BM, BK), tl.float32)
        if HAS_BIAS:
            out += tl.load(bias + channel, mask=keep, other=0.0).to(tl.float32)[None, :]
        for j in tl.static_range(K):
            row = now[j].to(tl.float32)
            if HAS_INITIAL and first == 0:
                source = t - (K - 1) + j
                inner = (source < 0)[:, None] & keep[None, :]
                place = past + (b * d + channel[None, :]) * (K - 1) + source[:, None] + (K - 1)
                row += tl.load(place, mask=inner, other=0.0).to(tl.float32)
            out += row * tl.load(weight + channel * K + j, mask=keep, other=0.0).to(tl.float32)[None, :]
        out = (out / (1.0 + tl.exp(-out))).to(y.dtype.element_ty)
        tl.store(y + at[:, None] * d + channel[None, :], out, mask=there[:, None] & keep[None, :])
        if first + BM > length - (K - 1):
            # what the next position looks back at
            back = t - (length - (K - 1))
            last = (there & (back >= 0))[:, None] & keep[None, :]
            tl.store(final + (b * d + channel[None, :]) * (K - 1) + back[:, None], now[K - 1], mask=last)
        left = tl.load(
            x_proj + rank[None, :] * d + channel[:, None],
            mask=(rank < RANK)[None, :] & keep[:, None],
            other=0.0,
        )
        low = multiplied(out, left, low, CAST)
        right = tl.load(
            x_proj + (RANK + rest)[None, :] * d + channel[:, None],
            mask=(rest < REST)[None, :] & keep[:, None], other=0.0,
        )  # fmt: skip
        both = multiplied(out, right, both, CAST)
        if not AHEAD:
            rows = rows_of(x, at, channel + BK, length, d, stride_xl, K)
    row = projected + at[:, None] * (RANK + REST)
    tl.store(
        row + RANK + rest[None, :], both.to(y.dtype.element_ty), mask=there[:, None] & (rest < REST)[None, :]
    )
    factor = low.to(y.dtype.element_ty)
    tl.store(row + rank[None, :], factor, mask=there[:, None] & (rank < RANK)[None, :])
    for begin in tl.range(0, d, BN, num_stages=STAGES):
        channel = begin + tl.arange(0, BN)
        keep = channel < d
        part = tl.load(
            delta_proj + channel[None, :] * RANK + rank[:, None],
            mask=(rank < RANK)[:, None] & keep[None, :],
            other=0.0,
        )
        made = multiplied(factor, part, tl.zeros((BM, BN), tl.float32), CAST)
        tl.store(
            delta + at[:, None] * d + channel[None, :],
            made.to(y.dtype.element_ty),
            mask=there[:, None] & keep[None, :],
        )
