"""Routing on a GPU: scores, the best experts, their weights and the balance's sums in one pass over the logits."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.reference.route import SMALLEST, Routed
from ssmoe.ops.reference.route import route as torch_route
from ssmoe.ops.triton.column_sums import add_rows
from ssmoe.ops.triton.launch import (
    cdiv,
    check_activations,
    check_shape,
    direct,
    on_device,
    power_of_two,
    some,
)

MOST = 16
"""Choices a token that the kernels take; beyond, torch sorts."""
WIDEST = 4096
PROGRAMS = 2112
"""Each with its own sums: sixteen a multiprocessor of an H100 or H200."""
CELLS = 512
"""Logits that a warp holds."""
Least = tl.constexpr(SMALLEST)


def route(
    logits: Tensor, real: Tensor, bias: Tensor | None = None, *, top_k: int, score: str, normalise: bool
) -> Routed:
    """`ssmoe.ops.reference.route` for float32 logits; no atomics. More than 16 choices take torch's operators."""
    t, e = logits.shape
    check_shape(real=(real, (t,)), bias=(bias, (e,)))
    if top_k > MOST or e > WIDEST or t == 0:
        return torch_route(logits, real, bias, top_k=top_k, score=score, normalise=normalise)
    check_activations(logits=logits, bias=bias)
    if logits.dtype != torch.float32:
        raise ValueError(f"logits are {logits.dtype}: a router works in float32")
    expert, weight, load, shares, sums = direct(route_forward, logits)(
        logits, real, bias, top_k, score == "sigmoid", normalise
    )
    z, entropy, confidence = sums.unbind()
    return Routed(expert, weight, load, shares, z, entropy.detach(), confidence.detach())


def _launch(logits: Tensor) -> tuple[int, dict[str, int]]:
    """Programs, and how a tile is laid out."""
    t, e = logits.shape
    block = power_of_two(e)
    rows = max(1, CELLS // block)
    layout = {"ROWS": rows, "BLOCK": block, "num_warps": max(1, block // CELLS)}
    return min(PROGRAMS, cdiv(t, rows)), layout


@torch.library.custom_op("ssmoe::route_forward", mutates_args=())
def route_forward(
    logits: Tensor, real: Tensor, bias: Tensor | None, top_k: int, sigmoid: bool, normalise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Experts, weights, loads, shares, and (z, entropy, confidence)."""
    t, e = logits.shape
    logits = logits.contiguous()
    programs, layout = _launch(logits)
    device = logits.device
    expert = torch.empty(t, top_k, dtype=torch.int32, device=device)
    weight = torch.empty(t, top_k, dtype=torch.float32, device=device)
    loads = torch.empty(programs, e, dtype=torch.int32, device=device)
    shares = torch.empty(programs, e, dtype=torch.float32, device=device)
    sums = torch.empty(programs, 3, dtype=torch.float32, device=device)
    with on_device(logits):
        route_forward_kernel[(programs,)](
            logits, real.view(torch.int8), *some(logits, bias), expert, weight, loads, shares, sums, t, e,
            K=top_k, SIGMOID=sigmoid, NORMALISE=normalise, BIASED=bias is not None, **layout,
        )  # fmt: skip
        load = torch.empty(e, dtype=torch.int64, device=device)
        share = torch.empty(e, dtype=torch.float32, device=device)
        total = torch.empty(3, dtype=torch.float32, device=device)
        totals_kernel[(cdiv(e, 16) + 1,)](
            loads, shares, sums, load, share, total, programs, e, ROWS=min(512, power_of_two(programs)),
            BLOCK=16, num_warps=8,
        )  # fmt: skip
    return expert, weight, load, share, total


@route_forward.register_fake
def _(logits, real, bias, top_k, sigmoid, normalise):  # noqa: ARG001
    t, e = logits.shape
    return (
        logits.new_empty((t, top_k), dtype=torch.int32), logits.new_empty((t, top_k)),
        logits.new_empty(e, dtype=torch.int64), logits.new_empty(e), logits.new_empty(3),
    )  # fmt: skip


@torch.library.custom_op("ssmoe::route_backward", mutates_args=())
def route_backward(
    logits: Tensor, real: Tensor, expert: Tensor, weight: Tensor, dweight: Tensor, dshares: Tensor, dsums: Tensor,
    sigmoid: bool, normalise: bool,
) -> Tensor:  # fmt: skip
    """The gradient of the logits."""
    t, e = logits.shape
    logits = logits.contiguous()
    dlogits = torch.empty_like(logits)
    programs, layout = _launch(logits)
    with on_device(logits):
        route_backward_kernel[(programs,)](
            logits, real.view(torch.int8), expert, weight, dweight.contiguous(), dshares.contiguous(),
            dsums.contiguous(), dlogits, t, e, K=expert.shape[1], SIGMOID=sigmoid, NORMALISE=normalise, **layout,
        )  # fmt: skip
    return dlogits


@route_backward.register_fake
def _(logits, real, expert, weight, dweight, dshares, dsums, sigmoid, normalise):  # noqa: ARG001
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, real, _, _, ctx.sigmoid, ctx.normalise = inputs
    ctx.save_for_backward(logits, real, *output[:2])
    ctx.mark_non_differentiable(output[0], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, _, dweight, __, dshares, dsums):
    logits, real, expert, weight = ctx.saved_tensors
    dweight = torch.zeros_like(weight) if dweight is None else dweight
    dshares = logits.new_zeros(logits.shape[1]) if dshares is None else dshares
    dsums = logits.new_zeros(3) if dsums is None else dsums
    given = (logits, real, expert, weight, dweight, dshares, dsums)
    return route_backward(*given, ctx.sigmoid, ctx.normalise), None, None, None, None, None


route_forward.register_autograd(_backward, setup_context=_save)


@triton.jit
def tile_of(logits, real, row, column, rows, e):
    """Which rows are there and real, and their logits, -inf beyond the last expert."""
    there = row < rows
    is_real = tl.load(real + row, mask=there, other=0) != 0
    value = tl.load(
        logits + row[:, None] * e + column[None, :], mask=there[:, None] & (column < e)[None, :], other=0.0
    )
    return there, is_real, tl.where((column < e)[None, :], value, float("-inf"))


@triton.jit
def probabilities(value, column, e, SIGMOID: tl.constexpr):
    """Scores, softmax, logsumexp, and what a row of scores is divided by to become a distribution."""
    top = tl.max(value, axis=1)
    power = tl.exp(value - top[:, None])
    total = tl.sum(power, axis=1)
    softmax = power / total[:, None]
    score = softmax
    whole = tl.full(total.shape, 1.0, tl.float32)
    if SIGMOID:
        score = tl.where((column < e)[None, :], 1.0 / (1.0 + tl.exp(-value)), 0.0)
        whole = tl.maximum(tl.sum(score, axis=1), Least)
    return score, softmax, top + tl.log(total), whole


@triton.jit
def route_forward_kernel(
    logits, real, bias, expert, weight, loads, shares, sums, rows, e,
    K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    lead = tl.load(bias + column, mask=column < e, other=0.0) if BIASED else tl.zeros((BLOCK,), tl.float32)
    taken = tl.zeros((ROWS, BLOCK), tl.int32)
    portion = tl.zeros((ROWS, BLOCK), tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    entropy = tl.zeros((ROWS,), tl.float32)
    confidence = tl.zeros((ROWS,), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        there, is_real, value = tile_of(logits, real, row, column, rows, e)
        score, _, log_sum, whole = probabilities(value, column, e, SIGMOID)
        share = tl.where(is_real[:, None], score / whole[:, None], 0.0)
        portion += share
        z += tl.where(is_real, log_sum * log_sum, 0.0)
        entropy -= tl.sum(share * tl.log(tl.maximum(share, 1e-30)), axis=1)
        confidence += tl.max(share, axis=1)
        choice = tl.where((column < e)[None, :], score + lead[None, :], float("-inf"))
        values = ()
        total = tl.zeros((ROWS,), tl.float32)
        for i in tl.static_range(K):
            _, index = tl.max(choice, axis=1, return_indices=True)
            # where logits are no numbers, still an expert
            index = tl.minimum(index, e - 1)
            picked = column[None, :] == index[:, None]
            choice = tl.where(picked, float("-inf"), choice)
            taken += (picked & is_real[:, None]).to(tl.int32)
            own = tl.sum(tl.where(picked, score, 0.0), axis=1)
            tl.store(expert + row * K + i, tl.where(is_real, index, -1), mask=there)
            total += own
            values = values + (own,)
        scale = 1.0 / tl.maximum(total, Least) if NORMALISE else tl.full((ROWS,), 1.0, tl.float32)
        for i in tl.static_range(K):
            tl.store(weight + row * K + i, tl.where(is_real, values[i] * scale, 0.0), mask=there)
    at = program * e + column
    tl.store(loads + at, tl.sum(taken, axis=0), mask=column < e)
    tl.store(shares + at, tl.sum(portion, axis=0), mask=column < e)
    tl.store(sums + program * 3, tl.sum(z, axis=0))
    tl.store(sums + program * 3 + 1, tl.sum(entropy, axis=0))
    tl.store(sums + program * 3 + 2, tl.sum(confidence, axis=0))


@triton.jit
def totals_kernel(
    loads, shares, sums, load, share, total, programs, e, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The programs' loads, shares and sums added up; the last program has the sums."""
    block = tl.program_id(0)
    if block == tl.num_programs(0) - 1:
        add_rows(sums, total, programs, 3, 0, ROWS, BLOCK)
    else:
        add_rows(shares, share, programs, e, block, ROWS, BLOCK)
        column = block * BLOCK + tl.arange(0, BLOCK)
        count = tl.zeros((ROWS, BLOCK), tl.int32)
        for begin in range(0, programs, ROWS):
            row = begin + tl.arange(0, ROWS)
            inside = (row < programs)[:, None] & (column < e)[None, :]
            count += tl.load(loads + row[:, None] * e + column[None, :], mask=inside, other=0)
        tl.store(load + column, tl.sum(count.to(tl.int64), axis=0), mask=column < e)


@triton.jit
def route_backward_kernel(
    logits, real, expert, weight, dweight, dshares, dsums, dlogits, rows, e,
    K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    dshare = tl.load(dshares + column, mask=column < e, other=0.0)[None, :]
    dz = tl.load(dsums)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        there, is_real, value = tile_of(logits, real, row, column, rows, e)
        score, softmax, log_sum, whole = probabilities(value, column, e, SIGMOID)
        slope = tl.zeros((ROWS, BLOCK), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        dot = tl.zeros((ROWS,), tl.float32)
        for i in tl.static_range(K):
            index = tl.load(expert + row * K + i, mask=there, other=-1)
            change = tl.load(dweight + row * K + i, mask=there, other=0.0)
            picked = column[None, :] == index[:, None]
            slope = tl.where(picked, change[:, None], slope)
            if NORMALISE:
                total += tl.sum(tl.where(picked, score, 0.0), axis=1)
                dot += change * tl.load(weight + row * K + i, mask=there, other=0.0)
        if NORMALISE:
            dot = tl.where(total > Least, dot, 0.0)
            scale = 1.0 / tl.maximum(total, Least)
            for i in tl.static_range(K):
                index = tl.load(expert + row * K + i, mask=there, other=-1)
                picked = column[None, :] == index[:, None]
                slope = tl.where(picked, (slope - dot[:, None]) * scale[:, None], slope)
        if SIGMOID:
            mean = tl.sum(dshare * score, axis=1) / whole
            own = (dshare - mean[:, None]) / whole[:, None]
            slope = (slope + own) * score * (1.0 - score)
        else:
            slope += dshare
            slope = score * (slope - tl.sum(slope * score, axis=1)[:, None])
        slope += (2.0 * dz * log_sum)[:, None] * softmax
        slope = tl.where(is_real[:, None], slope, 0.0)
        at = dlogits + row[:, None] * e + column[None, :]
        tl.store(at, slope, mask=there[:, None] & (column < e)[None, :])
