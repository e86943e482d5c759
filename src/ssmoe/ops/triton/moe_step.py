"""A mixture of experts for one position a row on a GPU, in four launches, none of which sorts anything.

With few rows an expert has one or two tokens, so every assignment reads its expert's weights for itself: scores
of all experts, the choice, hidden values, and what comes out of a token's experts, added up. Many rows share
their experts instead (`expert_mlp`).
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.reference.moe_step import compose
from ssmoe.ops.triton.expert_kernels import activate
from ssmoe.ops.triton.expert_mlp import ACTIVATIONS, expert_mlp
from ssmoe.ops.triton.launch import check_activations, check_shape, on_device, some
from ssmoe.ops.triton.route import MOST, WIDEST, Least, probabilities, route
from ssmoe.ops.triton.wide_linear import wide_linear

SHARE = 2
"""Assignments an expert, on average, from which on rows share their experts."""
TILE = 8192
"""Values of a weight's tile: 64 registers a thread in float32."""


def moe_step(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    *,
    top_k: int,
    score: str,
    normalise: bool,
    scale: float,
    activation: str,
) -> Tensor:
    """`ssmoe.ops.reference.moe_step` for float32 and bfloat16 activations."""
    check_activations(x=x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of: {', '.join(ACTIVATIONS)}")
    (t, d), (e, f, _) = x.shape, up.shape
    check_shape(router=(router, (e, d)), bias=(bias, (e,)))
    check_shape(up=(up, (e, f, d)), gate=(gate, (e, f, d)), down=(down, (e, d, f)))
    if top_k > MOST or e > WIDEST:
        return compose(
            x, router, bias, up, down, gate, top_k, score, normalise, scale, activation,
            expert_mlp, wide_linear, route,
        )  # fmt: skip
    x = x.contiguous()
    expert, weight = _choose(x, router.contiguous(), bias, top_k, score == "sigmoid", normalise, scale)
    if t * top_k > SHARE * e:
        return expert_mlp(x, up, down, gate, expert=expert, weight=weight, activation=activation)
    up, down = up.contiguous(), down.contiguous()
    gate = None if gate is None else gate.contiguous()
    hidden = torch.empty(t * top_k, f, dtype=x.dtype, device=x.device)
    y = torch.empty_like(x)
    # few rows leave most of the GPU idle unless each is spread over more programs
    few = t * top_k <= 16
    over_d, over_f = (min(512, triton.next_power_of_2(n)) for n in (d, f))
    wide = max(1, min((4096 if few else TILE) // over_d, triton.next_power_of_2(f)))
    high = max(1, min((4096 if few else TILE) // over_f, triton.next_power_of_2(d)))
    with on_device(x):
        hidden_kernel[(t * top_k, triton.cdiv(f, wide))](
            x, up, *some(up, gate), expert, hidden, f, d,
            TOP_K=top_k, BF=wide, BD=over_d, ACTIVATION=ACTIVATIONS[activation], GATED=gate is not None, num_warps=4,
        )  # fmt: skip
        output_kernel[(t, triton.cdiv(d, high))](
            hidden, down, expert, weight, y, f, d, TOP_K=top_k, BD=high, BF=over_f, num_warps=4
        )
    return y


def _choose(
    x: Tensor, router: Tensor, bias: Tensor | None, top_k: int, sigmoid: bool, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(t, top_k) experts int32 and their weights float32, the latter times `scale`."""
    (t, d), e = x.shape, router.shape[0]
    logits = torch.empty(t, e, dtype=torch.float32, device=x.device)
    expert = torch.empty(t, top_k, dtype=torch.int32, device=x.device)
    weight = torch.empty(t, top_k, dtype=torch.float32, device=x.device)
    over = min(512, triton.next_power_of_2(d))
    high = TILE // over
    block = triton.next_power_of_2(e)
    with on_device(x):
        scores_kernel[(t, triton.cdiv(e, high))](x, router, logits, e, d, BE=high, BD=over, num_warps=4)
        choose_kernel[(t,)](
            logits, *some(logits, bias), expert, weight, e, scale,
            K=top_k, SIGMOID=sigmoid, NORMALISE=normalise, BIASED=bias is not None, BLOCK=block,
            num_warps=max(1, min(8, block // 128)),
        )  # fmt: skip
    return expert, weight


@triton.jit
def scores_kernel(x, router, logits, e, d, BE: tl.constexpr, BD: tl.constexpr):
    """Logits of one token (axis 0) and some experts (axis 1)."""
    token = tl.program_id(0).to(tl.int64)
    expert = (tl.program_id(1) * BE + tl.arange(0, BE)).to(tl.int64)
    total = tl.zeros((BE,), tl.float32)
    for start in range(0, d, BD):
        column = start + tl.arange(0, BD)
        inside = column < d
        value = tl.load(x + token * d + column, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(
            router + expert[:, None] * d + column[None, :],
            mask=(expert < e)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(row.to(tl.float32) * value[None, :], axis=1)
    tl.store(logits + token * e + expert, total, mask=expert < e)


@triton.jit
def choose_kernel(
    logits, bias, expert, weight, e, scale,
    K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best experts of one token, as `route` chooses them."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(logits + token * e + column, mask=column < e, other=float("-inf"))[None, :]
    score, _, _, _ = probabilities(value, column, e, SIGMOID)
    lead = tl.load(bias + column, mask=column < e, other=0.0) if BIASED else tl.zeros((BLOCK,), tl.float32)
    choice = tl.where((column < e)[None, :], score + lead[None, :], float("-inf"))
    values = ()
    total = tl.zeros((1,), tl.float32)
    one = tl.arange(0, 1)
    for i in tl.static_range(K):
        _, index = tl.max(choice, axis=1, return_indices=True)
        # where logits are no numbers, still an expert
        index = tl.minimum(index, e - 1)
        picked = column[None, :] == index[:, None]
        choice = tl.where(picked, float("-inf"), choice)
        own = tl.sum(tl.where(picked, score, 0.0), axis=1)
        tl.store(expert + token * K + i + one, index)
        total += own
        values = values + (own,)
    factor = scale / tl.maximum(total, Least) if NORMALISE else tl.full((1,), 1.0, tl.float32) * scale
    for i in tl.static_range(K):
        tl.store(weight + token * K + i + one, values[i] * factor)


@triton.jit
def hidden_kernel(
    x, up, gate, expert, hidden, f, d,
    TOP_K: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Some hidden values (axis 1) of one assignment (axis 0)."""
    assignment = tl.program_id(0).to(tl.int64)
    e = tl.load(expert + assignment).to(tl.int64)
    row = tl.program_id(1) * BF + tl.arange(0, BF)
    at = (e * f + row)[:, None] * d
    value = tl.zeros((BF,), tl.float32)
    factor = tl.zeros((BF,), tl.float32)
    for start in range(0, d, BD):
        column = start + tl.arange(0, BD)
        token = tl.load(x + assignment // TOP_K * d + column, mask=column < d, other=0.0).to(tl.float32)
        mask = (row < f)[:, None] & (column < d)[None, :]
        tile = tl.load(up + at + column[None, :], mask=mask, other=0.0)
        value += tl.sum(tile.to(x.dtype.element_ty).to(tl.float32) * token[None, :], axis=1)
        if GATED:
            tile = tl.load(gate + at + column[None, :], mask=mask, other=0.0)
            factor += tl.sum(tile.to(x.dtype.element_ty).to(tl.float32) * token[None, :], axis=1)
    if GATED:
        value = activate(factor, ACTIVATION) * value
    else:
        value = activate(value, ACTIVATION)
    tl.store(hidden + assignment * f + row, value.to(hidden.dtype.element_ty), mask=row < f)


@triton.jit
def output_kernel(
    hidden, down, expert, weight, y, f, d, TOP_K: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Some channels (axis 1) of one token (axis 0): the weighted sum over its experts."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for i in tl.static_range(TOP_K):
        assignment = token * TOP_K + i
        e = tl.load(expert + assignment).to(tl.int64)
        own = tl.zeros((BD,), tl.float32)
        for start in range(0, f, BF):
            column = start + tl.arange(0, BF)
            value = tl.load(hidden + assignment * f + column, mask=column < f, other=0.0).to(tl.float32)
            mask = (row < d)[:, None] & (column < f)[None, :]
            tile = tl.load(down + (e * d + row)[:, None] * f + column[None, :], mask=mask, other=0.0)
            own += tl.sum(tile.to(y.dtype.element_ty).to(tl.float32) * value[None, :], axis=1)
        total += own * tl.load(weight + assignment)
    tl.store(y + token * d + row, total.to(y.dtype.element_ty), mask=row < d)
