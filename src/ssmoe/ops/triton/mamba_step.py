"""One token through a residual Mamba sub-layer on a GPU: checks, tile sizes and launches."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ssmoe.ops.reference.mamba_step import Layer, check, in_turn
from ssmoe.ops.triton import step_cuda
from ssmoe.ops.triton import step_kernels as kernels
from ssmoe.ops.triton.launch import counters, on_device
from ssmoe.ops.triton.step_cuda import Sizes

FEW = 4
"""Up to so many rows each is its own matrix-vector products; beyond, rows share tensor-core tiles.

`mamba_steps` takes big layers of up to so many rows in one launch, whose sums have another order. In every case a
row's bits do not depend on the other rows: tile sizes and the order of every sum are fixed.
"""


BIG = 1 << 22
"""Weights of out_proj beyond which layers have larger tiles, and few rows a stream of weights (`step_cuda`)."""

UPDATE_ROWS = 16
"""Rows that one program updates; tensor-core products have no fewer."""


class Few(NamedTuple):
    """Tiles of the launches for few rows; `group` tiles of `enter` add their sums up before they end."""

    enter_channels: int
    enter_columns: int
    enter_warps: int
    group: int
    advance_channels: int
    advance_warps: int
    out_columns: int
    out_terms: int
    out_warps: int


class Product(NamedTuple):
    """Tiles of one product of many rows: rows, columns, terms a step, programs that share the terms."""

    rows: int
    columns: int
    terms: int
    split: int
    warps: int
    stages: int


class Many(NamedTuple):
    """Tiles of the products for many rows, and of the state update."""

    project: Product
    low: Product
    out: Product
    update_channels: int
    update_warps: int


def mamba_step(
    x: Tensor,
    norm_weight: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    delta_proj: Tensor,
    A_log: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    out_proj: Tensor,
    *,
    norm_eps: float,
    norm_bias: Tensor | None = None,
    conv_state: Tensor,
    ssm_state: Tensor,
    out_conv: Tensor | None = None,
    out_ssm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssmoe.ops.reference.mamba_step` for layers that compute in float32 or bfloat16.

    Two runs are bitwise equal, and so is a row among at most FEW rows, or among more, whatever the others.
    """
    weights = (
        norm_weight,
        in_proj,
        conv_weight,
        conv_bias,
        x_proj,
        delta_proj,
        A_log,
        D,
        delta_bias,
        out_proj,
    )
    check(
        x, *weights, norm_bias=norm_bias, conv_state=conv_state, ssm_state=ssm_state,
        out_conv=out_conv, out_ssm=out_ssm,
    )  # fmt: skip
    dtype = conv_state.dtype
    if dtype not in (torch.float32, torch.bfloat16) or ssm_state.dtype != torch.float32:
        raise ValueError(
            f"mamba_step: states of {dtype} and {ssm_state.dtype}: the triton backend computes in float32 or "
            "bfloat16 with a float32 scan state"
        )
    b, (_, c, taps), n = x.shape[0], conv_state.shape, ssm_state.shape[2]
    sizes = Sizes(x.shape[1], c, delta_proj.shape[1], n, taps)
    if min(b, *sizes[:4]) < 1 or max(sizes.d, sizes.r) > 16384 or n > 256 or taps > 7:
        raise ValueError(
            f"mamba_step: b={b}, {sizes}: sizes start at 1; d_model and dt_rank end at 16384, d_state at 256, "
            "d_conv at 8"
        )
    matrices = (in_proj, x_proj, delta_proj, out_proj)
    call = _Call(
        sizes,
        # kernels that start early read weights at once, so none may have been made just now
        all(w.dtype == dtype and w.is_contiguous() for w in matrices),
        x.contiguous(),
        torch.promote_types(x.dtype, dtype),
        norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        norm_eps,
        *(w.to(dtype).contiguous() for w in matrices),
        *(w.contiguous() for w in (conv_weight, conv_bias, A_log, D, delta_bias)),
        conv_state.contiguous(),
        ssm_state.contiguous(),
        _room(conv_state, out_conv),
        _room(ssm_state, out_ssm),
    )
    with on_device(x):
        if b <= FEW or triton.next_power_of_2(n) > 64:
            y = step_few(call, few(sizes))
        else:
            y = step_many(call, many(sizes, dtype))
    return y, _deliver(call.out_conv, out_conv), _deliver(call.out_ssm, out_ssm)


class _Call(NamedTuple):
    """Dense tensors, the products' weights in the layer's dtype; settled: those are the caller's own."""

    sizes: Sizes
    settled: bool
    x: Tensor
    out_dtype: torch.dtype
    norm_weight: Tensor
    norm_bias: Tensor | None
    norm_eps: float
    in_proj: Tensor
    x_proj: Tensor
    delta_proj: Tensor
    out_proj: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    A_log: Tensor
    D: Tensor
    delta_bias: Tensor
    conv_state: Tensor
    ssm_state: Tensor
    out_conv: Tensor
    out_ssm: Tensor


def _room(state: Tensor, out: Tensor | None) -> Tensor:
    """Dense memory for the new state: `out` itself where that is dense."""
    if out is not None and out.is_contiguous():
        return out
    return torch.empty(state.shape, dtype=state.dtype, device=state.device)


def _deliver(found: Tensor, out: Tensor | None) -> Tensor:
    return found if out is None or out is found else out.copy_(found)


def _power(n: int, low: int = 1) -> int:
    return max(low, triton.next_power_of_2(n))


@cache
def few(sizes: Sizes) -> Few:
    """Tiles for few rows."""
    big = sizes.d * sizes.c > BIG
    return Few(
        enter_channels=min(16, _power(sizes.c)),
        enter_columns=min(128 if big else 1024, _power(sizes.d)),
        enter_warps=4 if big else 8,
        group=32 if big else 1,
        advance_channels=min(16, _power(sizes.c), max(1, 4096 // _power(sizes.n))),
        advance_warps=2,
        out_columns=min(4, _power(sizes.d)),
        out_terms=min(1024 if big else 2048, _power(sizes.c)),
        out_warps=4,
    )


@cache
def many(sizes: Sizes, dtype: torch.dtype) -> Many:
    """Tiles for many rows; they do not depend on how many."""
    big = sizes.d * sizes.c > BIG
    if dtype == torch.float32:
        plain = Product(32, 32, 32, 1, 4, 2)
        return Many(plain, plain, plain, 16, 4)
    return Many(
        project=Product(64, 64, 64, 1, 4, 6) if big else Product(64, 16, 128, 1, 4, 4),
        low=Product(64, 32, 64, 8, 4, 4) if big else Product(16, 32, 128, 8, 4, 4),
        out=Product(64, 64, 128, 2, 4, 4) if big else Product(64, 16, 256, 1, 4, 3),
        update_channels=16,
        update_warps=2,
    )


def step_few(call: _Call, tiles: Few) -> Tensor:
    """x + mixer(norm(x)) by two launches."""
    (d, c, r, n, taps), b, x = call.sizes, call.x.shape[0], call.x
    parts = triton.cdiv(c, tiles.enter_channels)
    groups = triton.cdiv(parts, tiles.group) if tiles.group > 1 else 0
    p, t = r + 2 * n, groups or parts

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    inner, gate, partial, grouped, y = (
        room(b, c),
        room(b, c),
        room(b, parts, p),
        room(b, groups, p),
        room(b, c),
    )
    out = torch.empty(b, d, dtype=call.out_dtype, device=x.device)
    pdl = _overlaps(x, early=True) if call.settled else 0
    kernels.enter_kernel[(parts, b)](
        x, call.norm_weight, x if call.norm_bias is None else call.norm_bias, call.in_proj, call.conv_weight,
        call.conv_bias, call.x_proj, call.conv_state, call.out_conv, inner, gate, partial, grouped,
        counters(x, b * groups), call.norm_eps,
        D=d, C=c, P=p, TAPS=taps, LAYERNORM=call.norm_bias is not None, COLUMNS=_power(d),
        BC=tiles.enter_channels, BK=tiles.enter_columns, PP=_power(p), WINDOW=_power(taps + 1),
        GROUP=tiles.group, PDL=pdl, num_warps=tiles.enter_warps, **_launch(pdl),
    )  # fmt: skip
    kernels.advance_kernel[(triton.cdiv(c, tiles.advance_channels), b)](
        call.delta_proj, call.A_log, call.D, call.delta_bias, call.ssm_state, call.out_ssm, inner, gate,
        grouped if groups else partial, y,
        C=c, R=r, N=n, T=t, BC=tiles.advance_channels, RP=_power(r), NP=_power(n), ROWS=_power(t), PDL=pdl,
        num_warps=tiles.advance_warps, **_launch(pdl),
    )  # fmt: skip
    kernels.project_out_kernel[(triton.cdiv(d, tiles.out_columns), b)](
        y, call.out_proj, x, out, D=d, C=c, BD=tiles.out_columns, BK=tiles.out_terms, PDL=pdl,
        num_warps=tiles.out_warps, **_launch(pdl),
    )  # fmt: skip
    return out


def step_many(call: _Call, tiles: Many) -> Tensor:
    """x + mixer(norm(x)) by five launches on tiles of rows."""
    (d, c, r, n, taps), b, x = call.sizes, call.x.shape[0], call.x
    dtype = call.conv_state.dtype
    p = r + 2 * n

    def room(width: int) -> Tensor:
        return torch.empty(b, width, dtype=dtype, device=x.device)

    h, mixed, inner, low, y = room(d), room(2 * c), room(c), room(p), room(c)
    out = torch.empty(b, d, dtype=call.out_dtype, device=x.device)
    pdl, precision = _overlaps(x, early=False) if call.settled else 0, _precision(x, dtype)
    kernels.norm_kernel[(b,)](
        x, call.norm_weight, x if call.norm_bias is None else call.norm_bias, h, call.norm_eps,
        D=d, COLUMNS=_power(d), LAYERNORM=call.norm_bias is not None, PRECISION=precision, PDL=pdl, num_warps=4,
        **_launch(pdl),
    )  # fmt: skip
    _product(h, call.in_proj, None, mixed, tiles.project, pdl)
    channels = min(256, _power(c))
    kernels.convolve_kernel[(triton.cdiv(c, channels), b)](
        mixed, call.conv_weight, call.conv_bias, call.conv_state, call.out_conv, inner,
        C=c, TAPS=taps, BC=channels, WINDOW=_power(taps + 1), PRECISION=precision, PDL=pdl, num_warps=4,
        **_launch(pdl),
    )  # fmt: skip
    _product(inner, call.x_proj, None, low, tiles.low, pdl)
    kernels.update_kernel[(triton.cdiv(c, tiles.update_channels), triton.cdiv(b, UPDATE_ROWS))](
        call.delta_proj, call.A_log, call.D, call.delta_bias, call.ssm_state, call.out_ssm, inner, mixed, low, y,
        b, C=c, R=r, N=n, BM=UPDATE_ROWS, BC=tiles.update_channels, RP=_power(r, 16), NP=_power(n), PRECISION=precision,
        PDL=pdl, num_warps=tiles.update_warps, **_launch(pdl),
    )  # fmt: skip
    _product(y, call.out_proj, x, out, tiles.out, pdl)
    return out


def _product(a: Tensor, w: Tensor, residual: Tensor | None, out: Tensor, t: Product, pdl: int) -> None:
    """out = a w^T (+ residual)"""
    (b, k), n = a.shape, w.shape[0]
    span = triton.cdiv(triton.cdiv(k, t.split), t.terms) * t.terms
    split = triton.cdiv(k, span)
    grid = (triton.cdiv(n, t.columns), triton.cdiv(b, t.rows), split)
    partial = torch.empty((split, b, n) if split > 1 else (0,), dtype=torch.float32, device=a.device)
    kernels.product_kernel[grid](
        a, w, out if residual is None else residual, out, partial, counters(a, grid[0] * grid[1]), b,
        K=k, N=n, SPLIT=split, SPAN=span, RESIDUAL=residual is not None, BM=t.rows, BN=t.columns, BK=t.terms,
        PRECISION=_precision(a, a.dtype), STAGES=t.stages, PDL=pdl,
        num_warps=t.warps, **_launch(pdl),
    )  # fmt: skip


def _overlaps(x: Tensor, *, early: bool) -> int:
    """The kernels' PDL, which is for compute capability 9 on; early: start the next one even sooner (2)."""
    return 1 + early if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0) else 0


def _precision(x: Tensor, dtype: torch.dtype) -> str:
    """The kernels' name for exact products; bfloat16 has but one kind on a GPU."""
    return ("tf32" if dtype == torch.bfloat16 else "ieee") if x.is_cuda else "wide"


def _launch(pdl: int) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}


def mamba_steps(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    norm_eps: float,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
    out_convs: Sequence[Tensor] | None = None,
    out_ssms: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """`mamba_step` through several layers of one shape; see the reference."""
    found = _streamed(x, layers, norm_eps, conv_states, ssm_states, out_convs, out_ssms)
    if found is not None:
        return found
    return in_turn(
        mamba_step, x, layers, norm_eps=norm_eps, conv_states=conv_states, ssm_states=ssm_states,
        out_convs=out_convs, out_ssms=out_ssms,
    )  # fmt: skip


def _streamed(
    x: Tensor,
    layers: Sequence[Layer],
    norm_eps: float,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
    out_convs: Sequence[Tensor] | None,
    out_ssms: Sequence[Tensor] | None,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]] | None:
    """All layers in one launch, None where `step_cuda` does not take them or `step_few` is as fast."""
    few_rows = x.is_cuda and 0 < x.shape[0] <= step_cuda.MOST_ROWS
    # in_proj is the third, twice as large as out_proj
    if not few_rows or not layers or layers[0][2].numel() <= 2 * BIG:
        return None
    none = [None] * len(layers)
    kept = zip(conv_states, ssm_states, out_convs or none, out_ssms or none, strict=True)
    for (weight, bias, *rest), (conv, ssm, out_conv, out_ssm) in zip(layers, kept, strict=True):
        check(
            x,
            weight,
            *rest,
            norm_bias=bias,
            conv_state=conv,
            ssm_state=ssm,
            out_conv=out_conv,
            out_ssm=out_ssm,
        )
    convs = [torch.empty_like(conv) for conv in conv_states] if out_convs is None else out_convs
    ssms = [torch.empty_like(ssm) for ssm in ssm_states] if out_ssms is None else out_ssms
    if not step_cuda.takes(x, layers, [*conv_states, *convs], [*ssm_states, *ssms]):
        return None
    cut = step_cuda.cut_for(x, layers[0])
    if cut is None:
        return None
    y = step_cuda.steps(x, layers, cut, norm_eps, conv_states, ssm_states, convs, ssms)
    return y, convs, ssms
