"""Kernels of one token through a residual Mamba sub-layer.

Few rows, three launches whose programs stream the weights once: `enter_kernel` normalises, projects and
convolves a tile of channels and adds up what they give to x_proj; `advance_kernel` finishes x_proj and updates
the state of a tile of channels; `project_out_kernel` is the last product. Sums over programs go through memory
and are added in a fixed order, so that two runs are bitwise equal.

Many rows: the same steps as tensor-core products of row tiles, with small kernels between them.

With PDL a kernel starts while the one before it still runs: it reads weights at once, and anything that a
kernel wrote only after `wait`.
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl


@triton.jit
def wait(PDL: tl.constexpr):
    """Let the next kernel start, then wait until all that earlier kernels wrote can be seen."""
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def softplus(v):
    """log(1 + exp(v)), exact to rounding for small exp(v) too."""
    e = tl.exp(-tl.abs(v))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(v, 0.0) + log1p


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. "wide" is for the interpreter, which cannot multiply bfloat16."""
    if PRECISION == "wide":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def rounded(value, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """value in dtype, to the nearest; the interpreter alone would cut bits off."""
    if PRECISION == "wide" and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def norm_terms(value, inside, size: tl.constexpr, eps, LAYERNORM: tl.constexpr):
    """(mean, 1 / deviation) of `size` numbers, zero where not `inside`; a mean of 0 for the root-mean-square norm."""
    mean = 0.0
    if LAYERNORM:
        mean = tl.sum(value, axis=0) / size
        value = tl.where(inside, value - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / size + eps)


@triton.jit
def parameters(norm_weight, norm_bias, column, size: tl.constexpr, LAYERNORM: tl.constexpr):
    """The norm's weight and bias (0 without one) at some columns, float32."""
    inside = column < size
    weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32) if LAYERNORM else 0.0
    return weight, bias


@triton.jit
def is_last(counter, total):
    """Whether this program is the last of `total` to arrive; what the others stored is then visible."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    last = arrived == total - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def enter_kernel(
    x, norm_weight, norm_bias, in_proj, conv_weight, conv_bias, x_proj, conv_state, out_conv,
    inner, gate, partial, grouped, counters, eps,
    D: tl.constexpr, C: tl.constexpr, P: tl.constexpr, TAPS: tl.constexpr, LAYERNORM: tl.constexpr,
    COLUMNS: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PP: tl.constexpr, WINDOW: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, rows). inner, gate: (b, C) float32. partial: (b, tiles, P), sums of x_proj.

    With GROUP > 1 the partial sums of so many tiles end up added in grouped: (b, groups, P).
    """
    tile = tl.program_id(0)
    tiles: tl.constexpr = (C + BC - 1) // BC
    row = tl.program_id(1).to(tl.int64)
    c = tile * BC + tl.arange(0, BC)
    channel = c < C
    k = tl.arange(0, BK)
    p = tl.arange(0, PP)
    j = tl.arange(0, WINDOW)
    all_columns = tl.arange(0, COLUMNS)
    at = in_proj + c[:, None] * D + k[None, :]
    keep = channel[:, None] & (k < D)[None, :]
    head_x = tl.load(at, mask=keep, other=0.0)
    head_z = tl.load(at + C * D, mask=keep, other=0.0)
    weight, bias = parameters(norm_weight, norm_bias, k, D, LAYERNORM)
    columns = tl.load(
        x_proj + p[:, None] * C + c[None, :], mask=(p < P)[:, None] & channel[None, :], other=0.0
    )
    tap = tl.load(
        conv_weight + c[:, None] * (TAPS + 1) + j[None, :],
        mask=channel[:, None] & (j <= TAPS)[None, :],
        other=0.0,
    ).to(tl.float32)
    shift = tl.load(conv_bias + c, mask=channel, other=0.0).to(tl.float32)
    wait(PDL)

    x += row * D
    value = tl.load(x + all_columns, mask=all_columns < D, other=0.0).to(tl.float32)
    part = tl.load(x + k, mask=k < D, other=0.0).to(tl.float32)
    # the window with this token's place empty: slots TAPS - 1 tokens back to 1, then the new one
    window = (row * C + c[:, None]) * TAPS + j[None, :]
    old = channel[:, None] & (j < TAPS)[None, :]
    past = tl.load(conv_state + window, mask=old, other=0.0)
    moved = tl.load(conv_state + window + 1, mask=channel[:, None] & (j < TAPS - 1)[None, :], other=0.0)
    mean, scale = norm_terms(value, all_columns < D, D, eps, LAYERNORM)
    h = ((part - mean) * scale * weight + bias)[None, :]
    if BK >= D:
        z = tl.sum(head_z.to(tl.float32) * h, axis=1)
        fresh = tl.sum(head_x.to(tl.float32) * h, axis=1)
    else:
        sum_x = tl.zeros((BC, BK), tl.float32)
        sum_z = tl.zeros((BC, BK), tl.float32)
        for begin in tl.range(0, D, BK):
            ahead = begin + BK + k
            keep = channel[:, None] & (ahead < D)[None, :]
            next_x = tl.load(at + begin + BK, mask=keep, other=0.0)
            next_z = tl.load(at + C * D + begin + BK, mask=keep, other=0.0)
            next_part = tl.load(x + ahead, mask=ahead < D, other=0.0).to(tl.float32)
            weight, bias = parameters(norm_weight, norm_bias, ahead, D, LAYERNORM)
            sum_x += head_x.to(tl.float32) * h
            sum_z += head_z.to(tl.float32) * h
            h = ((next_part - mean) * scale * weight + bias)[None, :]
            head_x = next_x
            head_z = next_z
        z = tl.sum(sum_z, axis=1)
        fresh = tl.sum(sum_x, axis=1)
    # the state keeps the layer's dtype, so the convolution uses what it will read there later
    fresh = fresh.to(out_conv.dtype.element_ty)

    window_now = tl.where((j == TAPS)[None, :], fresh[:, None].to(tl.float32), past.to(tl.float32))
    value = silu(tl.sum(window_now * tap, axis=1) + shift)
    value = tl.where(channel, value, 0.0)
    # several threads may hold one channel: all have read before one writes
    tl.debug_barrier()
    tl.store(out_conv + window, tl.where((j == TAPS - 1)[None, :], fresh[:, None], moved), mask=old)
    tl.store(inner + row * C + c, value, mask=channel)
    tl.store(gate + row * C + c, z, mask=channel)
    sums = tl.sum(columns.to(tl.float32) * value[None, :], axis=1)
    tl.store(partial + (row * tiles + tile) * P + p, sums, mask=p < P)
    if GROUP > 1:
        groups: tl.constexpr = (tiles + GROUP - 1) // GROUP
        group = tile // GROUP
        members = tl.minimum(tiles - group * GROUP, GROUP)
        if is_last(counters + row * groups + group, members):
            member = group * GROUP + tl.arange(0, GROUP)
            ready = tl.load(
                partial + (row * tiles + member)[:, None] * P + p[None, :],
                mask=(member < tiles)[:, None] & (p < P)[None, :], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            tl.store(grouped + (row * groups + group) * P + p, tl.sum(ready, axis=0), mask=p < P)


@triton.jit
def parts_of(partial, T: tl.constexpr, P: tl.constexpr, begin: tl.constexpr, size: tl.constexpr,
             WIDTH: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Columns [begin, begin + size) of partial (T, P)."""
    column = tl.arange(0, WIDTH)
    t = tl.arange(0, ROWS)
    keep = (t < T)[:, None] & (column < size)[None, :]
    return tl.load(partial + t[:, None] * P + begin + column[None, :], mask=keep, other=0.0)


@triton.jit
def advance(delta_proj, A_log, skip, delta_bias, ssm_state, inner, gate, parts, row, c,
            C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, T: tl.constexpr, RP: tl.constexpr,
            NP: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """(new state, its places, which are real, gated output) of channels c. parts: (b, T, R + 2N)."""
    P: tl.constexpr = R + 2 * N
    channel = c < C
    r = tl.arange(0, RP)
    n = tl.arange(0, NP)
    cell = channel[:, None] & (n < N)[None, :]
    places = (row * C + c[:, None]) * N + n[None, :]
    widen = tl.load(
        delta_proj + c[:, None] * R + r[None, :], mask=channel[:, None] & (r < R)[None, :], other=0.0
    )
    A = tl.load(A_log + c[:, None] * N + n[None, :], mask=cell, other=0.0).to(tl.float32)
    bias = tl.load(delta_bias + c, mask=channel, other=0.0).to(tl.float32)
    through = tl.load(skip + c, mask=channel, other=0.0).to(tl.float32)
    wait(PDL)

    parts += row * (T * P)
    low = parts_of(parts, T, P, 0, R, RP, ROWS)
    B = parts_of(parts, T, P, R, N, NP, ROWS)
    read = parts_of(parts, T, P, R + N, N, NP, ROWS)
    h = tl.load(ssm_state + places, mask=cell, other=0.0)
    value = tl.load(inner + row * C + c, mask=channel, other=0.0)
    z = tl.load(gate + row * C + c, mask=channel, other=0.0)
    delta = softplus(tl.sum(widen.to(tl.float32) * tl.sum(low, axis=0)[None, :], axis=1) + bias)
    B = tl.sum(B, axis=0)
    h = tl.exp(-delta[:, None] * tl.exp(A)) * h + (delta * value)[:, None] * B[None, :]
    y = tl.sum(h * tl.sum(read, axis=0)[None, :], axis=1) + through * value
    return h, places, cell, tl.where(channel, y * silu(z), 0.0)


@triton.jit
def advance_kernel(
    delta_proj, A_log, skip, delta_bias, ssm_state, out_ssm, inner, gate, parts, y,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BC: tl.constexpr, RP: tl.constexpr,
    NP: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The state and the gated output y (b, C) float32. Grid (channel tiles, rows)."""
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    h, places, cell, out = advance(
        delta_proj,
        A_log,
        skip,
        delta_bias,
        ssm_state,
        inner,
        gate,
        parts,
        row,
        c,
        C,
        R,
        N,
        T,
        RP,
        NP,
        ROWS,
        PDL,
    )
    tl.debug_barrier()
    tl.store(out_ssm + places, h, mask=cell)
    tl.store(y + row * C + c, out, mask=c < C)


@triton.jit
def project_out_kernel(
    y,
    out_proj,
    x,
    out,
    D: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out (b, D) = x + out_proj y. Grid (column tiles, rows)."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    row = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BK)
    column = d < D
    at = out_proj + d[:, None] * C + k[None, :]
    head = tl.load(at, mask=column[:, None] & (k < C)[None, :], other=0.0)
    wait(PDL)
    y += row * C
    value = tl.load(y + k, mask=k < C, other=0.0)
    residual = tl.load(x + row * D + d, mask=column, other=0.0).to(tl.float32)
    if BK >= C:
        total = tl.sum(head.to(tl.float32) * value[None, :], axis=1)
    else:
        sums = tl.zeros((BD, BK), tl.float32)
        for begin in tl.range(0, C, BK):
            ahead = begin + BK + k
            next_head = tl.load(at + begin + BK, mask=column[:, None] & (ahead < C)[None, :], other=0.0)
            next_value = tl.load(y + ahead, mask=ahead < C, other=0.0)
            sums += head.to(tl.float32) * value[None, :]
            head = next_head
            value = next_value
        total = tl.sum(sums, axis=1)
    tl.debug_barrier()
    tl.store(out + row * D + d, residual + total, mask=column)


@triton.jit
def norm_kernel(x, norm_weight, norm_bias, out, eps, D: tl.constexpr, COLUMNS: tl.constexpr,
                LAYERNORM: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out: (b, D), the norm of x in out's dtype. Grid (b,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    weight, bias = parameters(norm_weight, norm_bias, column, D, LAYERNORM)
    wait(PDL)
    x += row * D
    value = tl.load(x + column, mask=column < D, other=0.0).to(tl.float32)
    mean, scale = norm_terms(value, column < D, D, eps, LAYERNORM)
    value = (value - mean) * scale * weight + bias
    tl.store(out + row * D + column, rounded(value, out.dtype.element_ty, PRECISION), mask=column < D)


@triton.jit
def convolve_kernel(
    mixed, conv_weight, conv_bias, conv_state, out_conv, inner,
    C: tl.constexpr, TAPS: tl.constexpr, BC: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """inner (b, C) from the first half of mixed (b, 2C), in_proj's output. Grid (channel tiles, rows)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    row = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, WINDOW)
    channel = c < C
    tap = tl.load(
        conv_weight + c[:, None] * (TAPS + 1) + j[None, :],
        mask=channel[:, None] & (j <= TAPS)[None, :],
        other=0.0,
    ).to(tl.float32)
    shift = tl.load(conv_bias + c, mask=channel, other=0.0).to(tl.float32)
    wait(PDL)
    fresh = tl.load(mixed + row * (2 * C) + c, mask=channel, other=0.0)
    window = (row * C + c[:, None]) * TAPS + j[None, :]
    old = channel[:, None] & (j < TAPS)[None, :]
    past = tl.load(conv_state + window, mask=old, other=0.0)
    moved = tl.load(conv_state + window + 1, mask=channel[:, None] & (j < TAPS - 1)[None, :], other=0.0)
    now = tl.where((j == TAPS)[None, :], fresh[:, None].to(tl.float32), past.to(tl.float32))
    value = silu(tl.sum(now * tap, axis=1) + shift)
    # several threads may hold one channel: all have read before one writes
    tl.debug_barrier()
    tl.store(out_conv + window, tl.where((j == TAPS - 1)[None, :], fresh[:, None], moved), mask=old)
    tl.store(inner + row * C + c, rounded(value, inner.dtype.element_ty, PRECISION), mask=channel)


@triton.jit
def product_kernel(
    a, w, residual, out, partial, counters, rows,
    K: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, SPAN: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out = a w^T (+ residual); a: (rows, K), w: (N, K). Grid (column tiles, row tiles, SPLIT).

    With SPLIT > 1 each program adds up SPAN of the K terms; the last of a tile adds the programs' sums.
    """
    tiles: tl.constexpr = (N + BN - 1) // BN
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    k0 = tl.program_id(2) * SPAN
    wait(PDL)
    acc = tl.zeros((BM, BN), tl.float32)
    for begin in tl.range(0, SPAN, BK, num_stages=STAGES):
        k = k0 + begin + tl.arange(0, BK)
        inside = k < K
        left = tl.load(
            a + row[:, None] * K + k[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            w + column[None, :] * K + k[:, None], mask=(column < N)[None, :] & inside[:, None], other=0.0
        )
        acc = dot(left, right, acc, PRECISION)
    keep = (row < rows)[:, None] & (column < N)[None, :]
    at = row[:, None] * N + column[None, :]
    if SPLIT == 1:
        if RESIDUAL:
            acc += tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
            tl.debug_barrier()
        tl.store(out + at, rounded(acc, out.dtype.element_ty, PRECISION), mask=keep)
    else:
        tl.store(partial + tl.program_id(2).to(tl.int64) * rows * N + at, acc, mask=keep)
        if is_last(counters + tl.program_id(1) * tiles + tl.program_id(0), SPLIT):
            acc = tl.zeros((BM, BN), tl.float32)
            if RESIDUAL:
                acc += tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
            for s in tl.static_range(SPLIT):
                acc += tl.load(
                    partial + rows.to(tl.int64) * N * s + at, mask=keep, other=0.0, cache_modifier=".cg"
                )
            tl.debug_barrier()
            tl.store(out + at, rounded(acc, out.dtype.element_ty, PRECISION), mask=keep)


@triton.jit
def update_kernel(
    delta_proj, A_log, skip, delta_bias, ssm_state, out_ssm, inner, mixed, low, out, rows,
    C: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, RP: tl.constexpr,
    NP: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The state and gated output (b, C) of each row; low: (b, R + 2N), x_proj's output, mixed: (b, 2C), in_proj's.

    Grid (channel tiles, row tiles).
    """
    P: tl.constexpr = R + 2 * N
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, RP)
    n = tl.arange(0, NP)
    channel = c < C
    widen = tl.load(
        delta_proj + c[None, :] * R + r[:, None], mask=channel[None, :] & (r < R)[:, None], other=0.0
    )
    A = -tl.exp(
        tl.load(A_log + c[:, None] * N + n[None, :], mask=channel[:, None] & (n < N)[None, :], other=0.0).to(
            tl.float32
        )
    )
    bias = tl.load(delta_bias + c, mask=channel, other=0.0).to(tl.float32)
    through = tl.load(skip + c, mask=channel, other=0.0).to(tl.float32)
    wait(PDL)
    real = row < rows
    keep = real[:, None] & channel[None, :]
    cell = keep[:, :, None] & (n < N)[None, None, :]
    places = (row[:, None, None] * C + c[None, :, None]) * N + n[None, None, :]
    h = tl.load(ssm_state + places, mask=cell, other=0.0)
    narrow = tl.load(low + row[:, None] * P + r[None, :], mask=real[:, None] & (r < R)[None, :], other=0.0)
    state_mask = real[:, None] & (n < N)[None, :]
    B = tl.load(low + row[:, None] * P + R + n[None, :], mask=state_mask, other=0.0).to(tl.float32)
    read = tl.load(low + row[:, None] * P + R + N + n[None, :], mask=state_mask, other=0.0).to(tl.float32)
    value = tl.load(inner + row[:, None] * C + c[None, :], mask=keep, other=0.0).to(tl.float32)
    z = tl.load(mixed + row[:, None] * (2 * C) + C + c[None, :], mask=keep, other=0.0).to(tl.float32)
    delta = softplus(dot(narrow, widen, tl.zeros((BM, BC), tl.float32) + bias[None, :], PRECISION))
    h = tl.exp(delta[:, :, None] * A[None, :, :]) * h + (delta * value)[:, :, None] * B[:, None, :]
    y = tl.sum(h * read[:, None, :], axis=2) + through[None, :] * value
    tl.debug_barrier()
    tl.store(out_ssm + places, h, mask=cell)
    tl.store(
        out + row[:, None] * C + c[None, :], rounded(y * silu(z), out.dtype.element_ty, PRECISION), mask=keep
    )
