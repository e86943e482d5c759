"""Kernels of the selective scan: states in registers, time in the loop, one warp a program.

A tile of states is (n, channels) and Triton's default layout for one warp spreads the last axis first: with 32
channels each thread owns one channel and all its states, so <C, h> needs no shuffle; with 8 channels four
threads share one and the sum over channels in the backward is cheap. B and C are packed to float32 rows once.
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# stands for an infinite step: exp(RESET * A) is 0 for every A at or below -TINY, and TINY itself decays nothing
RESET = tl.constexpr(1.0e36)
TINY = tl.constexpr(1.0e-30)


@triton.jit
def softplus_sigmoid(v):
    """softplus(v) to a relative 2e-7 everywhere, and sigmoid(v)."""
    e = tl.exp2(-tl.abs(v) * LOG2E)
    # log1p(e) / e on [0, 1]
    p = -0.008539203554391861 * e + 0.04408961534500122
    p = p * e - 0.10768169164657593
    p = p * e + 0.17745240032672882
    p = p * e - 0.24495461583137512
    p = p * e + 0.33275479078292847
    p = p * e - 0.4999740421772003
    p = p * e + 0.9999998211860657
    return tl.maximum(v, 0.0) + p * e, tl.where(v >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def load_rows(pointer, stride, t, length, keep, T: tl.constexpr, EVEN: tl.constexpr):
    """T consecutive rows as a tuple; rows past the end are zero."""
    rows = ()
    for i in tl.static_range(T):
        if EVEN:
            row = tl.load(pointer + i * stride, mask=keep, other=0.0)
        else:
            row = tl.load(pointer + i * stride, mask=keep & (t + i < length), other=0.0)
        rows = rows + (row,)
    return rows


@triton.jit
def load_flags(pointer, t, length, T: tl.constexpr, EVEN: tl.constexpr, PRESENT: tl.constexpr):
    """The flags of T positions: bit 0 real, bit 1 reset."""
    flags = ()
    for i in tl.static_range(T):
        if PRESENT:
            if EVEN:
                flags = flags + (tl.load(pointer + i).to(tl.int32),)
            else:
                flags = flags + (tl.load(pointer + i, mask=t + i < length, other=0).to(tl.int32),)
        else:
            flags = flags + (1,)
    return flags


@triton.jit
def touch_rows(packed, t, length, T: tl.constexpr, NP: tl.constexpr):
    """Bring T rows of B and C into L1, where the steps then read them; hand the values to `drop`."""
    at = tl.arange(0, T * 2 * NP)
    return tl.load(packed + at, mask=(at < (length - t) * (2 * NP)) & (at >= -t * (2 * NP)), other=0.0)


@triton.jit
def drop(values, pointer, zero):
    """A use that the compiler cannot remove and that never happens: `zero` is 0 at run time."""
    at = tl.arange(0, values.shape[0])
    tl.store(pointer + at, values, mask=at < zero)


@triton.jit
def load_decay(A, n, c, d, N: tl.constexpr, SEGMENTS: tl.constexpr):
    """A in units of log2(e), zero where n or channel lie outside, as an (n, channels) tile."""
    a = tl.load(A + c * N + n, mask=(n < N) & (c < d), other=0.0).to(tl.float32) * LOG2E
    if SEGMENTS:
        a = tl.minimum(a, -TINY)
    return a


@triton.jit
def pack_kernel(
    B, C, flags, packed, rows, length,
    stride_bb, stride_bl, stride_cb, stride_cl,
    N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """B and C, (b, l, n) with any row strides, to float32 rows (b * l, 2 * NP), zero on padding."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    n = tl.arange(0, NP)[None, :]
    keep = (row < rows) & (n < N)
    if SEGMENTS:
        keep = keep & ((tl.load(flags + row, mask=row < rows, other=0).to(tl.int32) & 1) != 0)
    b = row // length
    t = row - b * length
    inside = row < rows
    target = packed + row * (2 * NP) + n
    tl.store(
        target,
        tl.load(B + b * stride_bb + t * stride_bl + n, mask=keep, other=0.0).to(tl.float32),
        mask=inside,
    )
    value = tl.load(C + b * stride_cb + t * stride_cl + n, mask=keep, other=0.0).to(tl.float32)
    tl.store(target + NP, value, mask=inside)


# `A` comes transposed, with a row length of unknown alignment: a load that cannot be vectorised along channels
# keeps Triton's default layout, one channel a lane, for the whole loop
@triton.jit(do_not_specialize=["columns", "zero"])
def forward_kernel(
    x, delta, z, packed, A_transposed, skip, bias, initial, flags, y, checkpoints, final, chunk_states, chunk_steps,
    length, columns, zero, blocks, chunks, chunk_blocks, stride_xb, stride_db, stride_zb,
    d: tl.constexpr, stride_xl: tl.constexpr, stride_dl: tl.constexpr, stride_zl: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
    EVEN: tl.constexpr, HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, SEGMENTS: tl.constexpr, SAVE: tl.constexpr, LOCAL: tl.constexpr,
    CHUNKED: tl.constexpr,
):  # fmt: skip
    """One chunk of time for BD channels. LOCAL: only the state that the chunk reaches from zero."""
    pid = tl.program_id(0)
    groups = tl.cdiv(d, BD)
    group = pid % groups
    chunk = (pid // groups) % (chunks - 1 if LOCAL else chunks)
    b = (pid // groups // (chunks - 1 if LOCAL else chunks)).to(tl.int64)

    channel = group * BD + tl.arange(0, BD)
    keep = channel < d
    n2 = tl.arange(0, NP)[:, None]
    c2 = channel[None, :]
    inside = (n2 < N) & (c2 < d)
    a = tl.load(A_transposed + n2 * columns + c2, mask=inside, other=0.0)
    if SEGMENTS:
        a = tl.minimum(a, -TINY)
    skip_row = tl.load(skip + channel, mask=keep, other=0.0).to(tl.float32) if HAS_SKIP else 0.0
    bias_row = tl.load(bias + channel, mask=keep, other=0.0).to(tl.float32) if HAS_BIAS else 0.0

    h = tl.zeros((NP, BD), tl.float32)
    if not LOCAL:
        if CHUNKED:
            h = tl.load(chunk_states + ((b * chunks + chunk) * d + c2) * N + n2, mask=inside, other=0.0)
        elif HAS_INITIAL:
            h = tl.load(initial + (b * d + c2) * N + n2, mask=inside, other=0.0)

    first = chunk * chunk_blocks
    last = tl.minimum(first + chunk_blocks, blocks)
    t = (first * T).to(tl.int64)
    n = tl.arange(0, NP)
    x_at = x + b * stride_xb + t * stride_xl + channel
    delta_at = delta + b * stride_db + t * stride_dl + channel
    z_at = z + b * stride_zb + t * stride_zl + channel
    y_at = y + (b * length + t) * d + channel
    packed_at = packed + (b * length + t) * (2 * NP)
    flags_at = flags + b * length + t
    steps = tl.zeros((BD,), tl.float32)

    next_x = load_rows(x_at, stride_xl, t, length, keep, T, EVEN)
    next_delta = load_rows(delta_at, stride_dl, t, length, keep, T, EVEN)
    present = (n >= 0) if EVEN else (n >= 0) & (t < length)
    next_b = tl.load(packed_at + n, mask=present, other=0.0)
    if not LOCAL:
        next_c = tl.load(packed_at + NP + n, mask=present, other=0.0)
    for block in range(first, last):
        xs, deltas = next_x, next_delta
        if HAS_Z and not LOCAL:
            zs = load_rows(z_at, stride_zl, t, length, keep, T, EVEN)
        marks = load_flags(flags_at, t, length, T, EVEN, SEGMENTS)
        x_at += T * stride_xl
        delta_at += T * stride_dl
        ahead = keep & (block + 1 < last)
        next_x = load_rows(x_at, stride_xl, t + T, length, ahead, T, EVEN)
        next_delta = load_rows(delta_at, stride_dl, t + T, length, ahead, T, EVEN)
        touched = touch_rows(packed_at + T * 2 * NP, t + T, length, T, NP)
        if SAVE:
            tl.store(checkpoints + ((b * blocks + block) * d + c2) * N + n2, h, mask=inside)
        ys = ()
        for i in tl.static_range(T):
            step, _ = softplus_sigmoid(deltas[i].to(tl.float32) + bias_row)
            row = xs[i].to(tl.float32)
            decay_step = step
            if SEGMENTS:
                real = (marks[i] & 1) != 0
                step = tl.where(real, step, 0.0)
                row = tl.where(real, row, 0.0)
                decay_step = tl.where((marks[i] & 2) != 0, RESET, step)
            elif not EVEN:
                step = tl.where(t + i < length, step, 0.0)
                decay_step = step
            # one step ahead of their use; the last block's last step has nothing ahead
            bt = next_b
            present = (n >= 0) & (t + i + 1 < length) if i + 1 == T or not EVEN else (n >= 0)
            next_b = tl.load(packed_at + (i * 2 + 2) * NP + n, mask=present, other=0.0)
            h = tl.exp2(decay_step[None, :] * a) * h + (step * row)[None, :] * bt[:, None]
            if LOCAL:
                steps += decay_step
            else:
                ct = next_c
                next_c = tl.load(packed_at + (i * 2 + 3) * NP + n, mask=present, other=0.0)
                out = tl.sum(h * ct[:, None], axis=0)
                if HAS_SKIP:
                    out += skip_row * row
                if HAS_Z:
                    gate = zs[i].to(tl.float32)
                    if SEGMENTS:
                        gate = tl.where((marks[i] & 1) != 0, gate, 0.0)
                    out = out * gate / (1.0 + tl.exp2(-gate * LOG2E))
                ys = ys + (out,)
        if not LOCAL:
            for i in tl.static_range(T):
                mask = keep if EVEN else keep & (t + i < length)
                tl.store(y_at + i * d, ys[i].to(y.dtype.element_ty), mask=mask)
        drop(touched, packed, zero)
        t += T
        z_at += T * stride_zl
        y_at += T * d
        packed_at += T * 2 * NP
        flags_at += T

    if LOCAL:
        tl.store(chunk_states + ((b * chunks + chunk) * d + c2) * N + n2, h, mask=inside)
        tl.store(chunk_steps + (b * chunks + chunk) * d + channel, steps, mask=keep)
    elif chunk == chunks - 1:
        tl.store(final + (b * d + c2) * N + n2, h, mask=inside)


@triton.jit
def combine_kernel(
    A, initial, chunk_states, chunk_steps, d, chunks,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
    HAS_INITIAL: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn each chunk's own state into the state that enters it, in place; REVERSE: the same for adjoints."""
    group = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    channel = group * BD + tl.arange(0, BD)
    keep = channel < d
    n2 = tl.arange(0, NP)[:, None]
    c2 = channel[None, :]
    inside = (n2 < N) & (c2 < d)
    a = load_decay(A, n2, c2, d, N, SEGMENTS)
    h = tl.zeros((NP, BD), tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial + (b * d + c2) * N + n2, mask=inside, other=0.0)
    for begin in range(0, chunks, T):
        owns = ()
        steps = ()
        for i in tl.static_range(T):
            chunk = chunks - 1 - begin - i if REVERSE else begin + i
            live = begin + i < chunks - 1
            at = (b * chunks + chunk) * d
            owns = owns + (tl.load(chunk_states + (at + c2) * N + n2, mask=inside & live, other=0.0),)
            steps = steps + (tl.load(chunk_steps + at + channel, mask=keep & live, other=0.0),)
        for i in tl.static_range(T):
            chunk = chunks - 1 - begin - i if REVERSE else begin + i
            at = (b * chunks + chunk) * d
            tl.store(chunk_states + (at + c2) * N + n2, h, mask=inside & (begin + i < chunks))
            h = owns[i] + tl.exp2(steps[i][None, :] * a) * h


@triton.jit
def backward_kernel(
    x, delta, packed, A, skip, bias, flags, checkpoints, dy, dfinal, chunk_states, chunk_steps,
    dx, ddelta, dpacked, dA, dskip, dbias, dinitial,
    length, batch, zero, blocks, chunks, chunk_blocks, stride_xb, stride_db, stride_yb,
    d: tl.constexpr, stride_xl: tl.constexpr, stride_dl: tl.constexpr, stride_yl: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, T: tl.constexpr,
    EVEN: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, SEGMENTS: tl.constexpr, LOCAL: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """The adjoint of one chunk, BD channels; blocks of T positions are replayed from their checkpoints.

    g_t = C_t dy_t + a_{t+1} g_{t+1} walks backwards. LOCAL: only the adjoint that leaves the chunk when zero
    enters it, and the sum of its steps.
    """
    pid = tl.program_id(0)
    groups = tl.cdiv(d, BD)
    group = pid % groups
    # the first chunk's own adjoint is never needed
    chunk = (pid // groups) % (chunks - 1) + 1 if LOCAL else (pid // groups) % chunks
    b = (pid // groups // (chunks - 1 if LOCAL else chunks)).to(tl.int64)

    channel = group * BD + tl.arange(0, BD)
    keep = channel < d
    c2 = channel[None, :]
    n2 = tl.arange(0, NP)[:, None]
    n = tl.arange(0, NP)
    inside = (n2 < N) & (c2 < d)
    a = load_decay(A, n2, c2, d, N, SEGMENTS)
    skip_row = tl.load(skip + channel, mask=keep, other=0.0).to(tl.float32) if HAS_SKIP else 0.0
    bias_row = tl.load(bias + channel, mask=keep, other=0.0).to(tl.float32) if HAS_BIAS else 0.0

    g = tl.zeros((NP, BD), tl.float32)
    if not LOCAL:
        if CHUNKED:
            g = tl.load(chunk_states + ((b * chunks + chunk) * d + c2) * N + n2, mask=inside, other=0.0)
        else:
            g = tl.load(dfinal + (b * d + c2) * N + n2, mask=inside, other=0.0)
    sum_A = tl.zeros((NP, BD), tl.float32)
    sum_skip = tl.zeros((BD,), tl.float32)
    sum_bias = tl.zeros((BD,), tl.float32)
    steps = tl.zeros((BD,), tl.float32)

    first = chunk * chunk_blocks
    last = tl.minimum(first + chunk_blocks, blocks)
    t = ((last - 1) * T).to(tl.int64)
    x_at = x + b * stride_xb + t * stride_xl + channel
    delta_at = delta + b * stride_db + t * stride_dl + channel
    dy_at = dy + b * stride_yb + t * stride_yl + channel
    out_at = (b * length + t) * d + channel
    packed_at = packed + (b * length + t) * (2 * NP)
    dpacked_at = dpacked + ((group.to(tl.int64) * batch + b) * length + t) * (2 * NP) + n
    flags_at = flags + b * length + t

    next_x = load_rows(x_at, stride_xl, t, length, keep, T, EVEN)
    next_delta = load_rows(delta_at, stride_dl, t, length, keep, T, EVEN)
    next_dy = load_rows(dy_at, stride_yl, t, length, keep, T, EVEN)
    saved_at = checkpoints + ((b * blocks + last - 1) * d + c2) * N + n2
    if not LOCAL:
        next_h = tl.load(saved_at, mask=inside, other=0.0)
    for back in range(last - first):
        block = last - 1 - back
        xs, deltas, dys = next_x, next_delta, next_dy
        marks = load_flags(flags_at, t, length, T, EVEN, SEGMENTS)
        if not LOCAL:
            h = next_h
            states = (h,)
            saved_at -= d * N
            next_h = tl.load(saved_at, mask=inside & (block > first), other=0.0)
        touched = touch_rows(packed_at - T * 2 * NP, t - T, length, T, NP)
        ahead = keep & (block > first)
        x_at -= T * stride_xl
        delta_at -= T * stride_dl
        dy_at -= T * stride_yl
        next_x = load_rows(x_at, stride_xl, t - T, length, ahead, T, EVEN)
        next_delta = load_rows(delta_at, stride_dl, t - T, length, ahead, T, EVEN)
        next_dy = load_rows(dy_at, stride_yl, t - T, length, ahead, T, EVEN)

        decays = ()
        rows = ()
        widths = ()
        slopes = ()
        for i in tl.static_range(T):
            step, slope = softplus_sigmoid(deltas[i].to(tl.float32) + bias_row)
            row = xs[i].to(tl.float32)
            decay_step = step
            if SEGMENTS:
                real = (marks[i] & 1) != 0
                step = tl.where(real, step, 0.0)
                slope = tl.where(real, slope, 0.0)
                row = tl.where(real, row, 0.0)
                decay_step = tl.where((marks[i] & 2) != 0, RESET, step)
            elif not EVEN:
                step = tl.where(t + i < length, step, 0.0)
                decay_step = step
            decay = tl.exp2(decay_step[None, :] * a)
            decays = decays + (decay,)
            rows = rows + (row,)
            widths = widths + (step,)
            slopes = slopes + (slope,)
            if LOCAL:
                steps += decay_step
            else:
                present = (n >= 0) if EVEN else (n >= 0) & (t + i < length)
                bt = tl.load(packed_at + i * 2 * NP + n, mask=present, other=0.0)
                h = decay * h + (step * row)[None, :] * bt[:, None]
                states = states + (h,)

        for i in tl.static_range(T - 1, -1, -1):
            live = (n >= 0) if EVEN else (n >= 0) & (t + i < length)
            store = keep if EVEN else keep & (t + i < length)
            ct = tl.load(packed_at + (i * 2 + 1) * NP + n, mask=live, other=0.0)[:, None]
            grad = dys[i].to(tl.float32)
            if SEGMENTS:
                grad = tl.where((marks[i] & 1) != 0, grad, 0.0)
            g += ct * grad[None, :]
            if LOCAL:
                g = g * decays[i]
            else:
                bt = tl.load(packed_at + i * 2 * NP + n, mask=live, other=0.0)[:, None]
                width = widths[i]
                row = rows[i]
                db = tl.sum(g * (width * row)[None, :], axis=1)
                dc = tl.sum(states[i + 1] * grad[None, :], axis=1)
                tl.store(dpacked_at + i * 2 * NP, db, mask=live)
                tl.store(dpacked_at + (i * 2 + 1) * NP, dc, mask=live)
                drive = tl.sum(g * bt, axis=0)
                g = g * decays[i]
                through = g * states[i]
                sum_A += through * width[None, :]
                dstep = row * drive + tl.sum(through * a, axis=0) * (1.0 / LOG2E)
                drow = width * drive
                if HAS_SKIP:
                    drow += skip_row * grad
                    sum_skip += row * grad
                dvalue = dstep * slopes[i]
                sum_bias += dvalue if EVEN else tl.where(t + i < length, dvalue, 0.0)
                tl.store(dx + out_at + i * d, drow.to(dx.dtype.element_ty), mask=store)
                tl.store(ddelta + out_at + i * d, dvalue.to(ddelta.dtype.element_ty), mask=store)
        drop(touched, packed, zero)
        t -= T
        out_at -= T * d
        packed_at -= T * 2 * NP
        dpacked_at -= T * 2 * NP
        flags_at -= T

    if LOCAL:
        tl.store(chunk_states + ((b * chunks + chunk) * d + c2) * N + n2, g, mask=inside)
        tl.store(chunk_steps + (b * chunks + chunk) * d + channel, steps, mask=keep)
    else:
        part = b * chunks + chunk
        tl.store(dA + (part * d + c2) * N + n2, sum_A, mask=inside)
        if HAS_SKIP:
            tl.store(dskip + part * d + channel, sum_skip, mask=keep)
        if HAS_BIAS:
            tl.store(dbias + part * d + channel, sum_bias, mask=keep)
        if HAS_INITIAL and chunk == 0:
            tl.store(dinitial + (b * d + c2) * N + n2, g, mask=inside)


@triton.jit
def gate_kernel(
    y, z, flags, dout, out, dz, rows, length, stride_zb, stride_zl, stride_ob, stride_ol,
    d: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SEGMENTS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """out = y silu(z), zero on padding; BACKWARD: out and dz are the gradients of y and z, from dout."""
    groups = tl.cdiv(d, BD)
    pid = tl.program_id(0)
    row = ((pid // groups).to(tl.int64) * BT + tl.arange(0, BT))[:, None]
    c = ((pid % groups) * BD + tl.arange(0, BD))[None, :]
    inside = (row < rows) & (c < d)
    b = row // length
    t = row - b * length
    keep = inside
    if SEGMENTS:
        keep = inside & ((tl.load(flags + row, mask=row < rows, other=0).to(tl.int32) & 1) != 0)
    gate = tl.load(z + b * stride_zb + t * stride_zl + c, mask=keep, other=0.0).to(tl.float32)
    value = tl.load(y + row * d + c, mask=keep, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp2(-gate * LOG2E))
    if BACKWARD:
        grad = tl.load(dout + b * stride_ob + t * stride_ol + c, mask=keep, other=0.0).to(tl.float32)
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(dz + row * d + c, (grad * value * slope).to(dz.dtype.element_ty), mask=inside)
        result = grad * gate * sigmoid
    else:
        result = value * gate * sigmoid
    tl.store(out + row * d + c, result.to(out.dtype.element_ty), mask=inside)
