"""The expert bank on a GPU: dispatch, six grouped products, and the custom op with its gradient."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.ops.triton import expert_kernels as kernels
from ssmoe.ops.triton import expert_tiles
from ssmoe.ops.triton.expert_routes import Routes, dispatch
from ssmoe.ops.triton.launch import (
    cdiv,
    check_activations,
    check_shape,
    direct,
    gradient_dtype,
    on_device,
    power_of_two,
    row_major,
    some,
)

ACTIVATIONS = {
    "relu": kernels.RELU.value,
    "relu_squared": kernels.RELU_SQUARED.value,
    "silu": kernels.SILU.value,
}


def expert_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    *,
    expert: Tensor,
    weight: Tensor,
    activation: str,
) -> Tensor:
    """The expert bank of `ssmoe.ops.reference.expert_mlp`, for float32 and bfloat16 activations.

    Nothing waits for the host and two runs are bitwise equal: no kernel uses atomics.
    """
    check_activations(x=x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of: {', '.join(ACTIVATIONS)}")
    (t, d), (e, f, _) = x.shape, up.shape
    check_shape(up=(up, (e, f, d)), gate=(gate, (e, f, d)), down=(down, (e, d, f)))
    check_shape(expert=(expert, (t, expert.shape[-1])), weight=(weight, tuple(expert.shape)))
    if expert.shape[-1] < 1 or e > 4095:
        raise ValueError(f"{expert.shape[-1]} experts a token of {e}: at least 1, of at most 4095")
    if t == 0:
        return x.clone()
    return direct(expert_forward, x)(x, up, down, gate, expert, weight.to(torch.float32), activation)[0]


class _Tiling(NamedTuple):
    """Tile sizes of a product (m, k) times (k, n), and how it is launched."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class _Tilings(NamedTuple):
    """Of each product: into the experts, out of them, the two backward, and the gradients of up and down.

    The first four have one m, to a multiple of which the rows of an expert are padded; the k of the last two
    divides it.
    """

    hidden: _Tiling
    output: _Tiling
    slope: _Tiling
    back: _Tiling
    up: _Tiling
    down: _Tiling


def _tilings(x: Tensor, up: Tensor, top_k: int, *, gated: bool) -> _Tilings:
    share = x.shape[0] * top_k / up.shape[0]
    if x.dtype == torch.float32:
        rows = _Tiling(m=64 if share > 32 else 16, n=64, k=32, warps=4, stages=2)
        weights = rows._replace(m=64, k=min(rows.m, 64))
        return _Tilings(rows, rows, rows, rows, weights, weights)
    if share <= 32:
        rows = _Tiling(m=16, n=128, k=64, warps=4, stages=3)
        weights = rows._replace(m=64, k=16)
        return _Tilings(rows._replace(n=64) if gated else rows, rows, rows, rows, weights, weights)
    rows = _Tiling(m=128, n=128, k=64, warps=8, stages=3)
    four = rows._replace(warps=4)
    if gated:
        # two products at a time: fewer warps with more registers each
        return _Tilings(
            hidden=rows._replace(stages=4) if up.shape[1] % 128 == 0 else four._replace(n=64),
            output=rows,
            slope=four,
            back=four,
            up=_Tiling(m=64, n=64, k=64, warps=4, stages=4),
            down=four._replace(m=64),
        )
    if up.shape[1] >= 1024 and up.shape[2] % 256 == 0:
        # of long products with few columns, fewer and wider tiles
        broad = rows._replace(n=256)
        return _Tilings(rows, broad, rows, broad, rows, rows)
    if up.shape[1] % 128 == 0 or up.shape[1] > 512:
        return _Tilings(rows, rows, rows, rows, rows, rows)
    # whole tiles across a narrow expert
    return _Tilings(
        hidden=rows._replace(n=64),
        output=rows,
        slope=rows._replace(n=64),
        back=rows,
        up=rows._replace(m=64, n=256),
        down=four._replace(n=64, stages=4),
    )


def _rows(a, w, out, routes, weight, tiling, *, transposed, mode, gather, activation, top_k, a2=None, w2=None,
          out2=None, wide=None, inner=None, inner2=None, partial=None, weighted=False, gated=False):  # fmt: skip
    """Launch rows_kernel: a (rows or tokens, k) times w[e], which is (n, k), or (k, n) if `transposed`."""
    e = w.shape[0]
    n, k = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
    num_tiles = routes.tiles.shape[0]
    kernels.rows_kernel[(num_tiles * cdiv(n, tiling.n),)](
        a, *some(a, a2), w, *some(w, w2), out, *some(out, out2, wide), routes.assignments, routes.tiles, weight,
        *some(a, inner, inner2), *some(weight, partial), num_tiles * tiling.m, n, k, a.stride(0), w.stride(0),
        1 if transposed else k, n if transposed else 1,
        TOP_K=top_k, E=e, BM=tiling.m, BN=tiling.n, BK=tiling.k, EVEN_N=n % tiling.n == 0, EVEN_K=k % tiling.k == 0,
        MODE=mode.value, GATHER=gather, SECOND=w2 is not None, WEIGHTED=weighted, ACTIVATION=ACTIVATIONS[activation],
        GATED=gated, WIDE=wide is not None, PRECISION=_precision(a), num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip


def _precision(a: Tensor) -> str:
    return "ieee" if a.dtype == torch.float32 else "tf32"


def _gather_output(slots: Tensor, routes: Routes, t: int, top_k: int) -> Tensor:
    """Each token's sum over its assignments' slots; one assignment's is the token's own."""
    if top_k == 1:
        return slots
    d = slots.shape[1]
    y = torch.empty(t, d, dtype=slots.dtype, device=slots.device)
    width = min(512, power_of_two(d))
    kernels.combine_kernel[(cdiv(t, 4) * cdiv(d, width),)](
        slots, routes.rows, y, t, d, TOP_K=top_k, BT=4, BD=width, num_warps=4
    )
    return y


def _slots(x: Tensor, count: int) -> Tensor:
    """One row an assignment."""
    return torch.empty(count, x.shape[1], dtype=x.dtype, device=x.device)


@torch.library.custom_op("ssmoe::expert_forward", mutates_args=())
def expert_forward(
    x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, expert: Tensor, weight: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, up, down and gate in x's dtype, inner values, those of the gate, x by row, then `Routes`).

    The weights are returned where they had to be cast, else empty; their gradients come in their own dtype.
    """
    t, top_k = expert.shape
    tilings = _tilings(x, up, top_k, gated=gate is not None)
    narrow = tuple(_cast(w, x) for w in (up, down, gate))
    up, down, gate = _pick(narrow, (up, down, gate))  # pyright: ignore[reportAssignmentType]
    x, up, down, weight = row_major(x), up.contiguous(), down.contiguous(), weight.contiguous()
    gate = None if gate is None else gate.contiguous()
    with on_device(x):
        slots = _slots(x, t * top_k)
        routes = dispatch(expert, up.shape[0], tilings.hidden.m, slots if top_k == 1 else None)
        shape = (routes.assignments.shape[0], up.shape[1])
        active = torch.empty(shape, dtype=x.dtype, device=x.device)
        gathered = x.new_empty(0)
        apart = _products_apart(x, active, top_k, activation, gated=gate is not None)
        tiled = apart and expert_tiles.fits(x, up, tilings.hidden.m)
        # relu's inner values are needed only where they are positive, and there they are the active ones
        alone = gate is None and activation == "relu"
        inner = active if alone else torch.empty_like(active)
        inner2 = torch.empty_like(active) if gate is not None else x.new_empty(0)
        if tiled:
            # the weights' gradients read the gathered rows once more
            gathered = _gathered(x, None, routes)
            expert_tiles.hidden(gathered, up, active, routes)
            expert_tiles.output(active, down, slots, routes, weight, transposed=False)
        else:
            _rows(x, up, inner, routes, weight, tilings.hidden, transposed=False, mode=kernels.HIDDEN, gather=True,
                  activation=activation, top_k=top_k, w2=gate, out2=inner2, wide=active, gated=gate is not None)  # fmt: skip
            _rows(active, down, slots, routes, weight, tilings.output, transposed=False, mode=kernels.OUTPUT,
                  gather=False, activation=activation, top_k=top_k, weighted=True)  # fmt: skip
        y = _gather_output(slots, routes, t, top_k)
    return y, *narrow, inner, inner2, gathered, *routes


def _cast(weight: Tensor | None, x: Tensor) -> Tensor:
    """In x's dtype; empty where it is already, or where there is none."""
    if weight is None or weight.dtype == x.dtype:
        return x.new_empty(0)
    return weight.to(x.dtype, memory_format=torch.contiguous_format)


def _pick(narrow, own):
    """The weights that were cast, and those that had no need to be."""
    return tuple(cast if cast.numel() else weight for cast, weight in zip(narrow, own, strict=True))


@expert_forward.register_fake
def _(x, up, down, gate, expert, weight, activation):  # noqa: ARG001
    t, top_k = expert.shape
    e, f, _ = up.shape
    tile = _tilings(x, up, top_k, gated=gate is not None).hidden.m
    count = t * top_k
    num_tiles = count // tile + min(e, count)

    def index(n):
        return x.new_empty(n, dtype=torch.int32)

    inner = x.new_empty(num_tiles * tile, f)
    inner2 = x.new_empty(inner.shape if gate is not None else (0,))
    apart = _products_apart(x, inner, top_k, activation, gated=gate is not None)
    gathered = x.new_empty((inner.shape[0], x.shape[1]) if apart and expert_tiles.fits(x, up, tile) else (0,))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    narrow = tuple(
        x.new_empty(w.shape if w is not None and w.dtype != x.dtype else (0,)) for w in (up, down, gate)
    )
    return (
        y,
        *narrow,
        inner,
        inner2,
        gathered,
        index(count),
        index(num_tiles * tile),
        index(num_tiles),
        index(e + 1),
    )


@torch.library.custom_op("ssmoe::expert_backward", mutates_args=())
def expert_backward(
    dy: Tensor, x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, weight: Tensor, activation: str,
    dtype: torch.dtype, inner: Tensor, inner2: Tensor, gathered: Tensor, rows: Tensor, assignments: Tensor, tiles: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, up, down, gate (empty without one), those three in `dtype`, and of weight."""
    t, top_k = weight.shape
    tilings = _tilings(x, up, top_k, gated=gate is not None)
    routes = Routes(rows, assignments, tiles, offsets)
    gated = gate is not None
    dy, x = dy.contiguous(), x.contiguous()
    up, down, weight = up.contiguous(), down.contiguous(), weight.contiguous()
    gate = gate.contiguous() if gated else None
    with on_device(x):
        dinner = torch.empty_like(inner)
        dgate_inner = torch.empty_like(inner) if gated else None
        apart = _products_apart(x, inner, top_k, activation, gated=gated)
        active = None if apart else torch.empty_like(inner)
        weighted = _gathered(dy, weight, routes) if apart else None
        if gathered.numel():
            partial = expert_tiles.slope(weighted, down, inner, dinner, routes, weight)
        else:
            groups = cdiv(up.shape[1], tilings.slope.n)
            partial = torch.empty(groups, inner.shape[0], dtype=torch.float32, device=x.device)
            _rows(dy, down, dinner, routes, weight, tilings.slope, transposed=True, mode=kernels.SLOPE, gather=True,
                  activation=activation, top_k=top_k, out2=dgate_inner, wide=active, inner=inner, inner2=inner2,
                  partial=partial, gated=gated)  # fmt: skip
        slots = _slots(x, t * top_k)
        _rows(dinner, up, slots, routes, weight, tilings.back, transposed=True, mode=kernels.OUTPUT, gather=False,
              activation=activation, top_k=top_k, a2=dgate_inner, w2=gate)  # fmt: skip
        dx = _gather_output(slots, routes, t, top_k)
        if apart:
            tiled = gathered.numel() > 0
            rows_of_x = gathered if tiled else _gathered(x, None, routes)
            dup = _grouped(dinner, rows_of_x, up, dtype, routes, tiled=tiled)
            ddown = _grouped(weighted, inner, down, dtype, routes, tiled=tiled)
            dgate = x.new_empty(0, dtype=dtype)
        else:
            dup, dgate = _weights(
                dinner, x, up, dtype, routes, tilings.up, top_k, gather_a=False, a2=dgate_inner
            )
            ddown, _ = _weights(dy, active, down, dtype, routes, tilings.down, top_k, gather_a=True)
        dweight = torch.empty(t, top_k, dtype=torch.float32, device=x.device)
        kernels.shares_kernel[(cdiv(t * top_k, 256),)](
            partial, rows, dweight, slots, t * top_k, inner.shape[0], partial.shape[0], x.shape[1], CLEAR=top_k == 1,
            BLOCK=256, num_warps=4,
        )  # fmt: skip
    return dx, dup, ddown, dgate, dweight


def _products_apart(x: Tensor, inner: Tensor, top_k: int, activation: str, *, gated: bool) -> bool:
    """Whether torch's grouped product pays for the gradients of the weights: rows are gathered for it, which costs
    little where a token has one row and experts are wide."""
    d, f = x.shape[1], inner.shape[1]
    fits = x.is_cuda and x.dtype == torch.bfloat16 and d % 64 == 0 and f % 64 == 0
    return fits and top_k == 1 and f >= 2 * d and activation == "relu" and not gated and x.shape[0] >= 4096


def _gathered(x: Tensor, weight: Tensor | None, routes: Routes) -> Tensor:
    """The token of each row, times the router's weight where one is given; one choice a token."""
    rows, d = routes.assignments.shape[0], x.shape[1]
    out = torch.empty(rows, d, dtype=x.dtype, device=x.device)
    width = min(512, power_of_two(d))
    # tiles are multiples of 16 rows
    kernels.gather_kernel[(rows // 16 * cdiv(d, width),)](
        x, routes.assignments, *some(x, weight), out, d, TOP_K=1, WEIGHTED=weight is not None, BT=16, BD=width,
        num_warps=4,
    )  # fmt: skip
    return out


def _grouped(
    a: Tensor, b: Tensor, like: Tensor, dtype: torch.dtype, routes: Routes, *, tiled: bool
) -> Tensor:
    """a^T b over each expert's rows, in `dtype`, shaped as `like`."""
    if tiled and like.shape[1] % expert_tiles.ROWS == 0 and like.shape[2] % (expert_tiles.COLUMNS // 2) == 0:
        return expert_tiles.gradient(a, b, like, dtype, routes)
    narrow = torch.nn.functional.grouped_mm(a.t(), b, offs=routes.offsets[1:])
    size = like[0].numel()
    if narrow.dtype == dtype:
        kernels.blank_kernel[(cdiv(size, 4096), like.shape[0])](narrow, routes.offsets, size, BLOCK=4096)
        return narrow
    out = torch.empty(like.shape, dtype=dtype, device=like.device)
    kernels.widen_kernel[(cdiv(size, 4096), like.shape[0])](narrow, routes.offsets, out, size, BLOCK=4096)
    return out


def _weights(a, b, like, dtype, routes, tiling, top_k, *, gather_a, a2=None):
    """The gradient of weights shaped as `like`, and that of the second ones (empty without a2)."""
    out = torch.empty(like.shape, dtype=dtype, device=like.device)
    out2 = torch.empty((0,) if a2 is None else like.shape, dtype=dtype, device=like.device)
    e, m, n = like.shape
    kernels.weights_kernel[(e * cdiv(m, tiling.m) * cdiv(n, tiling.n),)](
        a, *some(a, a2), b, out, out2, routes.assignments, routes.offsets, m, n,
        TOP_K=top_k, BM=tiling.m, BN=tiling.n, BK=tiling.k, EVEN=m % tiling.m == 0 and n % tiling.n == 0,
        GATHER_A=gather_a, SECOND=a2 is not None, PRECISION=_precision(a), num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return out, out2


@expert_backward.register_fake
def _(dy, x, up, down, gate, weight, activation, dtype, *kept):  # noqa: ARG001
    def like(t, dtype):
        return torch.empty((0,) if t is None else t.shape, dtype=dtype, device=x.device)

    return like(x, x.dtype), *(like(w, dtype) for w in (up, down, gate)), like(weight, weight.dtype)


def _save(ctx, inputs, output):
    x, up, down, gate, _, weight, activation = inputs
    weights = _pick(output[1:4], (up, down, gate))
    ctx.save_for_backward(x, *weights, weight, *output[4:])
    ctx.dtype = gradient_dtype(up)
    ctx.activation = activation
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    x, up, down, gate, weight, *kept = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    given = (dy, x, up, down, gate, weight, ctx.activation, ctx.dtype, *kept)
    dx, dup, ddown, dgate, dweight = expert_backward(*given)
    return dx, dup, ddown, None if gate is None else dgate, None, dweight, None


expert_forward.register_autograd(_backward, setup_context=_save)
