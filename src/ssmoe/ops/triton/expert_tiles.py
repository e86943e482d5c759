"""The expert bank's row products by tensor descriptors: a Hopper GPU's copy engine brings whole tiles.

Persistent programs, one a multiprocessor, take tile after tile. Rows lie expert by expert already, so that no address
is computed by row, but where results are scattered to assignments.
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

from ssmoe.ops.triton.expert_kernels import HIDDEN, OUTPUT, SLOPE
from ssmoe.ops.triton.launch import cdiv

ROWS, COLUMNS, DEPTH, WARPS, STAGES = 128, 256, 64, 8, 3
LEAST = tl.constexpr(1e-30)
"""In place of a smaller weight, by which a row is multiplied first and its sum divided later."""


def fits(x: Tensor, up: Tensor, rows: int) -> bool:
    """Whether x (t, d) and up (e, f, d) suit the kernel, in tiles of `rows` rows."""
    wide = x.shape[1] % DEPTH == 0 and up.shape[1] % DEPTH == 0
    return x.is_cuda and x.dtype == torch.bfloat16 and rows == ROWS and wide and _is_hopper(x.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def hidden(a: Tensor, up: Tensor, out: Tensor, routes) -> None:
    """out (rows, f) = relu(a up[e]^T) for a (rows, d)."""
    _launch(a, up, out, out, out, routes, out, out, mode=HIDDEN, transposed=False, weighted=False)


def output(a: Tensor, w: Tensor, out: Tensor, routes, weight: Tensor | None, *, transposed: bool) -> None:
    """The rows of a times w[e]^T, or w[e] if `transposed`, times `weight` where there is one, each to its assignment."""
    given = out if weight is None else weight
    weighted = weight is not None
    _launch(a, w, out, out, out, routes, given, out, mode=OUTPUT, transposed=transposed, weighted=weighted)


def slope(a: Tensor, down: Tensor, inner: Tensor, out: Tensor, routes, weight: Tensor) -> Tensor:
    """out (rows, f) = a down[e] where inner > 0, for rows a (rows, d) that are weighted already.

    Returned are parts (groups, rows) of <a down[e], inner> over the weight: its gradient.
    """
    partial = torch.empty(cdiv(down.shape[2], COLUMNS), a.shape[0], dtype=torch.float32, device=a.device)
    _launch(a, down, out, out, inner, routes, weight, partial, mode=SLOPE, transposed=True, weighted=True)
    return partial


def gradient(a: Tensor, b: Tensor, like: Tensor, dtype: torch.dtype, routes) -> Tensor:
    """a^T b over each expert's rows, in `dtype`, shaped as `like` (e, m, n), for a (rows, m) and b (rows, n)."""
    e, m, n = like.shape
    out = torch.empty(like.shape, dtype=dtype, device=a.device)
    # a float32 tile leaves less room for what is on its way
    half = COLUMNS // 2
    bank_kernel[(_programs(a.device),)](
        TensorDescriptor.from_tensor(a, [DEPTH, ROWS]), TensorDescriptor.from_tensor(b, [DEPTH, COLUMNS]),
        TensorDescriptor.from_tensor(out.view(e * m, n), [ROWS, half]), routes.offsets, m, n,
        E=e, SLOTS=max(16, triton.next_power_of_2(e)), BM=ROWS, BN=COLUMNS, BK=DEPTH,
        DTYPE=tl.bfloat16 if dtype == torch.bfloat16 else tl.float32, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def _launch(a, w, out, dense, inner, routes, weight, partial, *, mode, transposed, weighted) -> None:
    n, k = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
    rows, columns, depth = ROWS, COLUMNS, DEPTH
    scattered = mode.value == OUTPUT.value
    tile = [rows, columns]
    tiles_kernel[(_programs(a.device),)](
        TensorDescriptor.from_tensor(a, [rows, depth]),
        TensorDescriptor.from_tensor(w.reshape(-1, w.shape[2]), [depth, columns] if transposed else [columns, depth]),
        out, a if scattered else TensorDescriptor.from_tensor(dense, tile),
        TensorDescriptor.from_tensor(inner, tile) if mode.value == SLOPE.value else a,
        routes.assignments, routes.tiles, weight, partial, routes.tiles.shape[0], n, k, a.shape[0],
        E=w.shape[0], BM=rows, BN=columns, BK=depth, MODE=mode.value, TRANSPOSED=transposed, WEIGHTED=weighted,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


@triton.jit
def at_least(weight):
    """A weight that can be divided by."""
    return tl.where(tl.abs(weight) < LEAST, LEAST, weight)


@triton.jit
def tiles_kernel(
    a, w, out, dense, inner, assignments, tiles, weight, partial, num_tiles, N, K, rows,
    E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MODE: tl.constexpr,
    TRANSPOSED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Modes as in `rows_kernel`, with relu. a, w, dense and inner are descriptors where the mode has them."""
    groups = tl.cdiv(N, BN)
    for pid in tl.range(tl.program_id(0), num_tiles * groups, tl.num_programs(0)):
        tile = pid // groups
        e = tl.load(tiles + tile)
        if e < E:
            column = (pid % groups) * BN
            acc = tl.zeros((BM, BN), tl.float32)
            for begin in tl.range(0, K, BK):
                left = a.load([tile * BM, begin])
                if TRANSPOSED:
                    acc = tl.dot(left, w.load([e * K + begin, column]), acc)
                else:
                    acc = tl.dot(left, w.load([e * N + column, begin]).T, acc)
            row = tile.to(tl.int64) * BM + tl.arange(0, BM)
            if MODE == HIDDEN:
                dense.store([tile * BM, column], tl.maximum(acc, 0.0).to(out.dtype.element_ty))
            elif MODE == OUTPUT:
                assignment = tl.load(assignments + row)
                real = assignment >= 0
                if WEIGHTED:
                    acc = acc * tl.load(weight + assignment, mask=real, other=0.0)[:, None]
                n = column + tl.arange(0, BN)
                at = out + tl.where(real, assignment, 0).to(tl.int64)[:, None] * N + n[None, :]
                tl.store(at, acc.to(out.dtype.element_ty), mask=real[:, None] & (n < N)[None, :])
            else:
                value = inner.load([tile * BM, column]).to(tl.float32)
                assignment = tl.load(assignments + row)
                scale = at_least(tl.load(weight + assignment, mask=assignment >= 0, other=1.0))
                total = tl.sum(value * acc, axis=1) / scale
                dense.store([tile * BM, column], tl.where(value > 0, acc, 0.0).to(out.dtype.element_ty))
                tl.store(partial + (pid % groups).to(tl.int64) * rows + row, total)


@triton.jit
def bank_kernel(
    a, b, out, offsets, M, N, E: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Tiles of the experts with most rows first, so that programs end together."""
    e = tl.arange(0, SLOTS)
    begin = tl.load(offsets + e, mask=e < E, other=0)
    count = tl.load(offsets + e + 1, mask=e < E, other=-1) - begin
    before = (count[None, :] > count[:, None]) | (
        (count[None, :] == count[:, None]) & (e[None, :] < e[:, None])
    )
    place = tl.sum(before.to(tl.int32), axis=1)
    across = tl.cdiv(N, BN)
    each = M // BM * across
    for tile in tl.range(tl.program_id(0), E * each, tl.num_programs(0), flatten=True):
        expert = tl.sum(tl.where(place == tile // each, e, 0), axis=0)
        row, column = (tile % each) // across * BM, tile % across * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for at in tl.range(tl.load(offsets + expert), tl.load(offsets + expert + 1), BK):
            acc = tl.dot(a.load([at, row]).T, b.load([at, column]), acc)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        out.store([expert * M + row, column], left.to(DTYPE))
        out.store([expert * M + row, column + BN // 2], right.to(DTYPE))
