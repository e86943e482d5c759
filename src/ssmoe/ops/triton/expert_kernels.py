"""Kernels of the expert bank: dispatch without a sort, and matrix products whose rows are gathered and scattered.

Assignments (t, k) are laid out expert by expert, each expert's share padded to whole tiles, so that a tile of
rows meets one expert's weights. Padded rows read as zero and stay zero through every product.
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl

RELU = tl.constexpr(0)
RELU_SQUARED = tl.constexpr(1)
SILU = tl.constexpr(2)
# what a product's rows become
HIDDEN = tl.constexpr(0)
OUTPUT = tl.constexpr(1)
SLOPE = tl.constexpr(2)


@triton.jit
def load_bins(expert, at, count, E: tl.constexpr, BINS: tl.constexpr):
    """The expert of each assignment; a dropped one falls into the last bin."""
    bins = tl.load(expert + at, mask=at < count, other=-1)
    return tl.where((bins >= 0) & (bins < E), bins, BINS - 1)


@triton.jit
def count_kernel(expert, counts, count, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Each block's number of assignments to every expert, (bins, blocks)."""
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0)
    bins = load_bins(expert, block * BLOCK + tl.arange(0, BLOCK), count, E, BINS)
    tl.store(counts + tl.arange(0, BINS).to(tl.int64) * blocks + block, tl.histogram(bins, BINS))


@triton.jit
def before_kernel(counts, totals, blocks, BLOCK: tl.constexpr):
    """In place of a bin's counts (blocks,) what lies in the blocks before; totals (bins,)."""
    bin = tl.program_id(0)
    row = counts + bin.to(tl.int64) * blocks
    total = 0
    for begin in range(0, blocks, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < blocks, other=0)
        tl.store(row + at, total + tl.cumsum(value, 0) - value, mask=at < blocks)
        total += tl.sum(value, 0)
    tl.store(totals + bin, total)


@triton.jit
def layout_kernel(
    totals, offsets, tiles, assignments, num_tiles, TILE: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of expert e: its first row in offsets (e + 1,), its tiles, and -1 for the rows that fill up the last of them.

    An expert's rows are whole tiles; expert E has the tiles that no expert needs.
    """
    e = tl.program_id(0)
    bin = tl.arange(0, BINS)
    total = tl.load(totals + bin, mask=bin < E, other=0)
    whole = tl.cdiv(total, TILE) * TILE
    first = tl.sum(tl.where(bin < e, whole, 0), 0)
    own = tl.sum(tl.where(bin == e, total, 0), 0)
    last = tl.where(e < E, first + tl.cdiv(own, TILE) * TILE, num_tiles * TILE)
    tl.store(offsets + e, first)
    for begin in range(first // TILE, last // TILE, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(tiles + at, tl.zeros((BLOCK,), tl.int32) + e, mask=at < last // TILE)
    for begin in range(first + own, last, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(assignments + at, tl.full((BLOCK,), -1, tl.int32), mask=at < last)


@triton.jit
def clear(y, dropped, row, d, BLOCK: tl.constexpr):
    """Zero the rows of y (t, d) that are `dropped`: of tokens whose only assignment is, which no product writes."""
    for begin in range(0, d, 32):
        c = begin + tl.arange(0, 32)
        mask = dropped[:, None] & (c < d)[None, :]
        tl.store(y + row[:, None] * d + c[None, :], tl.zeros((BLOCK, 32), y.dtype.element_ty), mask=mask)


@triton.jit
def place_kernel(
    expert, before, offsets, rows, assignments, y, count, d,
    CLEAR: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each assignment's row: its expert's first, plus those before it in earlier blocks and in this one.

    CLEAR: an assignment is a token, and y is zeroed where it was dropped.
    """
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    bins = load_bins(expert, at, count, E, BINS)
    other = load_bins(expert, block * BLOCK + tl.arange(0, BLOCK), count, E, BINS)
    order = tl.arange(0, BLOCK)
    earlier = (bins[:, None] == other[None, :]) & (order[None, :] < order[:, None])
    kept = (at < count) & (bins < E)
    row = tl.load(offsets + bins, mask=kept, other=0)
    row += tl.load(before + bins.to(tl.int64) * tl.num_programs(0) + block)
    row += tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(rows + at, tl.where(kept, row, -1), mask=at < count)
    tl.store(assignments + row, at.to(tl.int32), mask=kept)
    if CLEAR:
        clear(y, (at < count) & (bins >= E), at, d, BLOCK)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        out = v / (1.0 + tl.exp(-v))
    else:
        out = tl.maximum(v, 0.0)
        if ACTIVATION == RELU_SQUARED:
            out = out * out
    return out


@triton.jit
def slope_of(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        s = 1.0 / (1.0 + tl.exp(-v))
        out = s * (1.0 + v * (1.0 - s))
    elif ACTIVATION == RELU_SQUARED:
        out = 2.0 * tl.maximum(v, 0.0)
    else:
        out = tl.where(v > 0, 1.0, 0.0)
    return out


@triton.jit
def multiply(acc, a_at, keep_a, w_at, keep_w, step_a, step_w, K, BK: tl.constexpr, EVEN_K: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """acc plus rows times weights, over the shared axis of length K."""
    k = tl.arange(0, BK)
    for begin in range(0, K, BK):
        if EVEN_K:
            a = tl.load(a_at, mask=keep_a, other=0.0)
            w = tl.load(w_at, mask=keep_w, other=0.0)
        else:
            a = tl.load(a_at, mask=keep_a & (begin + k < K)[None, :], other=0.0)
            w = tl.load(w_at, mask=keep_w & (begin + k < K)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        a_at += BK * step_a
        w_at += BK * step_w
    return acc


@triton.jit
def multiply_two(acc, acc2, a_at, keep_a, w_at, w2_at, keep_w, step_a, step_w, K, BK: tl.constexpr,
                 EVEN_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`multiply` by two matrices of weights, reading the rows once."""
    k = tl.arange(0, BK)
    for begin in range(0, K, BK):
        if EVEN_K:
            a = tl.load(a_at, mask=keep_a, other=0.0)
            w = tl.load(w_at, mask=keep_w, other=0.0)
            w2 = tl.load(w2_at, mask=keep_w, other=0.0)
        else:
            inside = begin + k < K
            a = tl.load(a_at, mask=keep_a & inside[None, :], other=0.0)
            w = tl.load(w_at, mask=keep_w & inside[:, None], other=0.0)
            w2 = tl.load(w2_at, mask=keep_w & inside[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        acc2 = tl.dot(a, w2, acc2, input_precision=PRECISION)
        a_at += BK * step_a
        w_at += BK * step_w
        w2_at += BK * step_w
    return acc, acc2


@triton.jit
def gates(acc, gate, out, out2, wide, first, row, column, N, BM: tl.constexpr, BN: tl.constexpr,
          ACTIVATION: tl.constexpr):  # fmt: skip
    """The gated HIDDEN end of a tile, 32 columns at a time so that its values stay in registers."""
    if BN > 32:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        left2, right2 = tl.split(tl.permute(tl.reshape(gate, (BM, 2, BN // 2)), (0, 2, 1)))
        gates(left, left2, out, out2, wide, first, row, column, N, BM, BN // 2, ACTIVATION)
        gates(right, right2, out, out2, wide, first, row, column + BN // 2, N, BM, BN // 2, ACTIVATION)
    else:
        n = column + tl.arange(0, BN)
        cells = first + (tl.arange(0, BM)[:, None] * N + n[None, :])
        inside = (row >= 0)[:, None] & (n < N)[None, :]
        tl.store(out + cells, acc.to(out.dtype.element_ty), mask=inside)
        tl.store(out2 + cells, gate.to(out.dtype.element_ty), mask=inside)
        tl.store(wide + cells, (activate(gate, ACTIVATION) * acc).to(wide.dtype.element_ty), mask=inside)


@triton.jit
def slopes(acc, scale, inner, inner2, out, out2, wide, first, row, column, N, BM: tl.constexpr, BN: tl.constexpr,
           ACTIVATION: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The SLOPE end of a tile, 32 columns at a time so that its values stay in registers: acc's sum by row."""
    if BN > 32:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        total = slopes(left, scale, inner, inner2, out, out2, wide, first, row, column, N, BM, BN // 2,
                       ACTIVATION, GATED, WIDE)  # fmt: skip
        total += slopes(right, scale, inner, inner2, out, out2, wide, first, row, column + BN // 2, N, BM, BN // 2,
                        ACTIVATION, GATED, WIDE)  # fmt: skip
    else:
        n = column + tl.arange(0, BN)
        cells = first + (tl.arange(0, BM)[:, None] * N + n[None, :])
        inside = (row >= 0)[:, None] & (n < N)[None, :]
        value = tl.load(inner + cells, mask=inside, other=0.0).to(tl.float32)
        grad = acc * scale[:, None]
        if GATED:
            gate = tl.load(inner2 + cells, mask=inside, other=0.0).to(tl.float32)
            factor = activate(gate, ACTIVATION)
            gate_grad = grad * value * slope_of(gate, ACTIVATION)
            tl.store(out2 + cells, gate_grad.to(out.dtype.element_ty), mask=inside)
            active = factor * value
            grad = grad * factor
        else:
            active = activate(value, ACTIVATION)
            grad = grad * slope_of(value, ACTIVATION)
        tl.store(out + cells, grad.to(out.dtype.element_ty), mask=inside)
        if WIDE:
            tl.store(wide + cells, (active * scale[:, None]).to(wide.dtype.element_ty), mask=inside)
        total = tl.sum(active * acc, axis=1)
    return total


@triton.jit
def rows_kernel(
    a, a2, w, w2, out, out2, wide, assignments, tiles, weight, inner, inner2, partial,
    tile_rows, N, K, stride_a, stride_e, stride_n, stride_k,
    TOP_K: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, MODE: tl.constexpr, GATHER: tl.constexpr, SECOND: tl.constexpr,
    WEIGHTED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows times its expert's weights.

    HIDDEN: out = the inner values, wide = the activated ones; GATED: `a @ w2` goes through the activation
    and is kept in out2. OUTPUT: scattered to the token (TOP_K = 1) or the assignment; SECOND adds a2 @ w2.
    SLOPE: the product is the gradient of the activated values; out, out2 = that of the inner ones, wide (only
    with WIDE) = the activated values times the router's weight, partial = this tile's share of that weight's
    gradient.
    """
    pid = tl.program_id(0)
    groups = tl.cdiv(N, BN)
    tile = pid // groups
    e = tl.load(tiles + tile)
    if e >= E:
        return
    row = tile.to(tl.int64) * BM + tl.arange(0, BM)
    n = (pid % groups) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    assignment = tl.load(assignments + row)
    real = assignment >= 0
    source = tl.where(real, assignment // TOP_K, 0).to(tl.int64) if GATHER else row
    keep_a = (real[:, None] & (k >= 0)[None, :]) if GATHER else (row >= 0)[:, None] & (k >= 0)[None, :]
    if EVEN_N:
        keep_w = (k >= 0)[:, None] & (n >= 0)[None, :]
    else:
        keep_w = (k >= 0)[:, None] & (n < N)[None, :]
    a_at = a + source[:, None] * stride_a + k[None, :]
    w_offsets = e.to(tl.int64) * stride_e + k[:, None] * stride_k + n[None, :] * stride_n
    acc = tl.zeros((BM, BN), tl.float32)
    if MODE == HIDDEN and GATED:
        gate = tl.zeros((BM, BN), tl.float32)
        acc, gate = multiply_two(acc, gate, a_at, keep_a, w + w_offsets, w2 + w_offsets, keep_w, 1, stride_k, K, BK,
                                 EVEN_K, PRECISION)  # fmt: skip
    else:
        acc = multiply(acc, a_at, keep_a, w + w_offsets, keep_w, 1, stride_k, K, BK, EVEN_K, PRECISION)

    # a scalar of 64 bits beside a tile's own offsets of 32: pointers of 64 take registers
    first = tile.to(tl.int64) * BM * N
    if MODE == HIDDEN:
        if GATED:
            gates(acc, gate, out, out2, wide, first, row, (pid % groups) * BN, N, BM, BN, ACTIVATION)
        else:
            cells = first + (tl.arange(0, BM)[:, None] * N + n[None, :])
            inside = (row >= 0)[:, None] & (n < N)[None, :]
            if ACTIVATION != RELU:
                tl.store(out + cells, acc.to(out.dtype.element_ty), mask=inside)
            tl.store(wide + cells, activate(acc, ACTIVATION).to(wide.dtype.element_ty), mask=inside)
    elif MODE == OUTPUT:
        if SECOND:
            a2_at = a2 + source[:, None] * stride_a + k[None, :]
            acc = multiply(acc, a2_at, keep_a, w2 + w_offsets, keep_w, 1, stride_k, K, BK, EVEN_K, PRECISION)
        if WEIGHTED:
            acc = acc * tl.load(weight + assignment, mask=real, other=0.0)[:, None]
        target = tl.where(real, assignment, 0).to(tl.int64)
        at = out + target[:, None] * N + n[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=real[:, None] & (n < N)[None, :])
    else:
        scale = tl.load(weight + assignment, mask=real, other=0.0)
        total = slopes(acc, scale, inner, inner2, out, out2, wide, first, row, (pid % groups) * BN, N, BM, BN,
                       ACTIVATION, GATED, WIDE)  # fmt: skip
        tl.store(partial + (pid % groups).to(tl.int64) * tile_rows + row, total)


@triton.jit
def weights_kernel(
    a, a2, b, out, out2, assignments, offsets, M, N,
    TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, GATHER_A: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e] = a^T b over expert e's rows; one of the two is read by token, the other by row.

    SECOND: out2[e] = a2^T b as well.
    """
    pid = tl.program_id(0)
    across = tl.cdiv(N, BN)
    down = tl.cdiv(M, BM)
    n = (pid % across) * BN + tl.arange(0, BN)
    m = ((pid // across) % down) * BM + tl.arange(0, BM)
    e = (pid // across // down).to(tl.int64)
    begin = tl.load(offsets + e)
    end = tl.load(offsets + e + 1)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN), tl.float32)
    for at in range(begin, end, BK):
        row = (at + k).to(tl.int64)
        assignment = tl.load(assignments + row)
        real = assignment >= 0
        token = tl.where(real, assignment // TOP_K, 0).to(tl.int64)
        row_a = token if GATHER_A else row
        row_b = row if GATHER_A else token
        if EVEN:
            keep_a = real[:, None] & (m >= 0)[None, :]
            keep_b = real[:, None] & (n >= 0)[None, :]
        else:
            keep_a = real[:, None] & (m < M)[None, :]
            keep_b = real[:, None] & (n < N)[None, :]
        left = tl.load(a + row_a[:, None] * M + m[None, :], mask=keep_a, other=0.0)
        right = tl.load(b + row_b[:, None] * N + n[None, :], mask=keep_b, other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
        if SECOND:
            left = tl.load(a2 + row_a[:, None] * M + m[None, :], mask=keep_a, other=0.0)
            acc2 = tl.dot(tl.trans(left), right, acc2, input_precision=PRECISION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    cells = (e * M + m[:, None]) * N + n[None, :]
    tl.store(out + cells, acc.to(out.dtype.element_ty), mask=inside)
    if SECOND:
        tl.store(out2 + cells, acc2.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gather_kernel(
    source, assignments, weight, out, d, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Each row its token's values, times the router's weight if WEIGHTED; zero where a tile is padded."""
    groups = tl.cdiv(d, BD)
    pid = tl.program_id(0)
    row = (pid // groups).to(tl.int64) * BT + tl.arange(0, BT)
    c = (pid % groups) * BD + tl.arange(0, BD)
    assignment = tl.load(assignments + row)
    real = assignment >= 0
    token = tl.where(real, assignment // TOP_K, 0).to(tl.int64)
    value = tl.load(
        source + token[:, None] * d + c[None, :], mask=real[:, None] & (c < d)[None, :], other=0.0
    )
    if WEIGHTED:
        # as `expert_tiles.at_least`, by which a sum of these is divided again
        scale = tl.load(weight + assignment, mask=real, other=1.0)
        scale = tl.where(tl.abs(scale) < 1e-30, 1e-30, scale)
        value = value.to(tl.float32) * scale[:, None]
    tl.store(out + row[:, None] * d + c[None, :], value.to(out.dtype.element_ty), mask=(c < d)[None, :])


@triton.jit
def shares_kernel(
    partial, rows, dweight, dx, count, tile_rows, groups, d, CLEAR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradient of each assignment's weight: the sum of its row's shares (groups, rows), 0 where it was dropped.

    CLEAR: as in `place_kernel`, of dx.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < count, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    place = partial + row
    for _ in range(groups):
        total += tl.load(place, mask=row >= 0, other=0.0)
        place += tile_rows
    tl.store(dweight + at, total, mask=at < count)
    if CLEAR:
        clear(dx, (at < count) & (row < 0), at, d, BLOCK)


@triton.jit
def widen_kernel(narrow, offsets, out, size, BLOCK: tl.constexpr):
    """An expert's `size` values in another dtype, zeros where it has no rows."""
    e = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(offsets + e + 1) > tl.load(offsets + e)
    first = e.to(tl.int64) * size
    value = tl.load(narrow + first + at, mask=(at < size) & used, other=0.0)
    tl.store(out + first + at, value.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def blank_kernel(out, offsets, size, BLOCK: tl.constexpr):
    """Zeros for the `size` values of an expert that has no rows."""
    e = tl.program_id(1)
    if tl.load(offsets + e + 1) == tl.load(offsets + e):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        first = out + e.to(tl.int64) * size
        tl.store(first + at, tl.zeros((BLOCK,), out.dtype.element_ty), mask=at < size)


@triton.jit
def combine_kernel(slots, rows, y, tokens, d, TOP_K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Each token's sum over its experts; a dropped assignment has no slot."""
    groups = tl.cdiv(d, BD)
    pid = tl.program_id(0)
    t = (pid // groups).to(tl.int64) * BT + tl.arange(0, BT)
    c = (pid % groups) * BD + tl.arange(0, BD)
    inside = (t < tokens)[:, None] & (c < d)[None, :]
    total = tl.zeros((BT, BD), tl.float32)
    for i in tl.static_range(TOP_K):
        kept = tl.load(rows + t * TOP_K + i, mask=t < tokens, other=-1) >= 0
        at = slots + (t * TOP_K + i)[:, None] * d + c[None, :]
        total += tl.load(at, mask=inside & kept[:, None], other=0.0).to(tl.float32)
    tl.store(y + t[:, None] * d + c[None, :], total.to(y.dtype.element_ty), mask=inside)
