"""Kernels of the causal convolution, streaming along length with the last rows in registers.

Where segments tell positions apart, every tap is a gather instead: a table (b, l, k) names each tap's source row: t >= 0 a row of x, -1 to -(k - 1) a row of the
initial state counted from its end, NONE nothing.
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl

NONE = tl.constexpr(-(1 << 20))


@triton.jit
def tap(x, initial, table, b, t, channel, length, d, stride_xb, stride_xl, j: tl.constexpr, K: tl.constexpr,
        FORWARD: tl.constexpr, HAS_INITIAL: tl.constexpr, TABLE: tl.constexpr):  # fmt: skip
    """Tap j of rows t as float32, zero outside; FORWARD looks back from t, otherwise ahead."""
    inside = (t < length)[:, None] & (channel < d)[None, :]
    if TABLE:
        source = tl.load(table + (b * length + t) * K + j, mask=t < length, other=NONE).to(tl.int64)
    elif FORWARD:
        source = t - (K - 1) + j
    else:
        source = t + (K - 1) - j
    rows = x + b * stride_xb + source[:, None] * stride_xl + channel[None, :]
    known = (source >= 0) & (source < length)
    value = tl.load(rows, mask=inside & known[:, None], other=0.0).to(tl.float32)
    if HAS_INITIAL:
        past = (source < 0) & (source > -K)
        at = initial + (b * d + channel[None, :]) * (K - 1) + source[:, None] + (K - 1)
        value += tl.load(at, mask=inside & past[:, None], other=0.0).to(tl.float32)
    return value


@triton.jit
def weights_of(weight, channel, d, j: tl.constexpr, K: tl.constexpr):
    return tl.load(weight + channel * K + j, mask=channel < d, other=0.0).to(tl.float32)[None, :]


@triton.jit
def is_real(table, b, t, length, K: tl.constexpr):
    return tl.load(table + (b * length + t) * K + K - 1, mask=t < length, other=NONE) != NONE


@triton.jit
def convolve_kernel(
    x, weight, bias, initial, table, y, length, d, stride_xb, stride_xl,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, TABLE: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """y = silu(conv + bias); with FORWARD off, the bare transposed convolution that carries the gradient back."""
    pid = tl.program_id(0)
    groups = tl.cdiv(d, BD)
    tiles = tl.cdiv(length, BT)
    b = (pid // (groups * tiles)).to(tl.int64)
    t = ((pid // groups) % tiles).to(tl.int64) * BT + tl.arange(0, BT)
    channel = (pid % groups) * BD + tl.arange(0, BD)
    out = tl.zeros((BT, BD), tl.float32)
    for j in tl.static_range(K):
        row = tap(
            x,
            initial,
            table,
            b,
            t,
            channel,
            length,
            d,
            stride_xb,
            stride_xl,
            j,
            K,
            FORWARD,
            HAS_INITIAL,
            TABLE,
        )
        out += row * weights_of(weight, channel, d, j, K)
    if FORWARD:
        if HAS_BIAS:
            out += tl.load(bias + channel, mask=channel < d, other=0.0).to(tl.float32)[None, :]
        out = out / (1.0 + tl.exp(-out))
        if TABLE:
            out = tl.where(is_real(table, b, t, length, K)[:, None], out, 0.0)
    inside = (t < length)[:, None] & (channel < d)[None, :]
    tl.store(y + (b * length + t[:, None]) * d + channel[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def slope_kernel(
    x, weight, bias, initial, table, dy, dinner, dweight, dbias,
    length, d, stride_xb, stride_xl, stride_yb, stride_yl,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """The gradient in front of the SiLU, and this program's share of the gradients of weight and bias."""
    pid = tl.program_id(0)
    groups = tl.cdiv(d, BD)
    spans = tl.cdiv(length, BT * TILES)
    b = (pid // (groups * spans)).to(tl.int64)
    span = (pid // groups) % spans
    channel = (pid % groups) * BD + tl.arange(0, BD)
    shift = tl.load(bias + channel, mask=channel < d, other=0.0).to(tl.float32)[None, :] if HAS_BIAS else 0.0
    sums = ()
    for j in tl.static_range(K + 1):
        sums = sums + (tl.zeros((BT, BD), tl.float32),)
    for tile in range(TILES):
        t = span.to(tl.int64) * (BT * TILES) + tile * BT + tl.arange(0, BT)
        inside = (t < length)[:, None] & (channel < d)[None, :]
        inner = tl.zeros((BT, BD), tl.float32) + shift
        taps = ()
        for j in tl.static_range(K):
            row = tap(
                x,
                initial,
                table,
                b,
                t,
                channel,
                length,
                d,
                stride_xb,
                stride_xl,
                j,
                K,
                True,
                HAS_INITIAL,
                TABLE,
            )
            inner += row * weights_of(weight, channel, d, j, K)
            taps = taps + (row,)
        grad_at = dy + b * stride_yb + t[:, None] * stride_yl + channel[None, :]
        if TABLE:
            inside_real = inside & is_real(table, b, t, length, K)[:, None]
        else:
            inside_real = inside
        grad = tl.load(grad_at, mask=inside_real, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-inner))
        grad = grad * sigmoid * (1.0 + inner * (1.0 - sigmoid))
        tl.store(
            dinner + (b * length + t[:, None]) * d + channel[None, :],
            grad.to(dinner.dtype.element_ty),
            mask=inside,
        )
        old = sums
        sums = ()
        for j in tl.static_range(K):
            sums = sums + (old[j] + grad * taps[j],)
        sums = sums + (old[K] + grad,)
    at = (b * spans + span) * d + channel
    for j in tl.static_range(K):
        tl.store(dweight + at * K + j, tl.sum(sums[j], axis=0), mask=channel < d)
    if HAS_BIAS:
        tl.store(dbias + at, tl.sum(sums[K], axis=0), mask=channel < d)


@triton.jit
def past_row(
    x, initial, b, t, channel, keep, d, stride_xb, stride_xl, K: tl.constexpr, HAS_INITIAL: tl.constexpr
):
    """Row t of x as float32; before its beginning the initial state, or zero."""
    row = tl.load(x + b * stride_xb + t * stride_xl + channel, mask=keep & (t >= 0), other=0.0).to(tl.float32)
    if HAS_INITIAL:
        at = initial + (b * d + channel) * (K - 1) + t + (K - 1)
        row += tl.load(at, mask=keep & (t < 0), other=0.0).to(tl.float32)
    return row


@triton.jit
def taps_of(weight, channel, keep, K: tl.constexpr):
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (tl.load(weight + channel * K + j, mask=keep, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def stream_forward_kernel(
    x, weight, bias, initial, y, final, length, stride_xb, d: tl.constexpr, stride_xl: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """T * BLOCKS positions of BD channels; the last of a row leave its last inputs in `final`."""
    pid = tl.program_id(0)
    groups = tl.cdiv(d, BD)
    spans = tl.cdiv(length, T * BLOCKS)
    b = (pid // (groups * spans)).to(tl.int64)
    t = ((pid // groups) % spans).to(tl.int64) * (T * BLOCKS)
    channel = (pid % groups) * BD + tl.arange(0, BD)
    keep = channel < d
    taps = taps_of(weight, channel, keep, K)
    shift = tl.load(bias + channel, mask=keep, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    window = ()
    for j in tl.static_range(1, K):
        window = window + (
            past_row(x, initial, b, t - K + j, channel, keep, d, stride_xb, stride_xl, K, HAS_INITIAL),
        )
    for _ in range(BLOCKS):
        rows = ()
        for i in tl.static_range(T):
            at = x + b * stride_xb + (t + i) * stride_xl + channel
            rows = rows + (tl.load(at, mask=keep & (t + i < length), other=0.0),)
        for i in tl.static_range(T):
            row = rows[i].to(tl.float32)
            out = row * taps[K - 1] + shift
            for j in tl.static_range(K - 1):
                out += window[j] * taps[j]
            out = out / (1.0 + tl.exp(-out))
            at = y + (b * length + t + i) * d + channel
            tl.store(at, out.to(y.dtype.element_ty), mask=keep & (t + i < length))
            window = window[1:] + (row,)
        t += T
    if HAS_FINAL:  # noqa: SIM102
        if t >= length:
            end = b * 0 + length  # in 64 bits
            for j in tl.static_range(K - 1):
                row = past_row(
                    x,
                    initial,
                    b,
                    end - (K - 1) + j,
                    channel,
                    keep,
                    d,
                    stride_xb,
                    stride_xl,
                    K,
                    HAS_INITIAL,
                )
                at = final + (b * d + channel) * (K - 1) + j
                tl.store(at, row.to(final.dtype.element_ty), mask=keep)


@triton.jit
def loaded(at, stride, t, limit, keep, T: tl.constexpr):
    """T rows from t on, zero from `limit` on."""
    rows = ()
    for i in tl.static_range(T):
        rows = rows + (tl.load(at + (t + i) * stride, mask=keep & (t + i < limit), other=0.0),)
    return rows


@triton.jit
def stream_backward_kernel(
    x, weight, bias, initial, dy, dx, head, dweight, dbias, length, stride_xb, stride_yb,
    d: tl.constexpr, stride_xl: tl.constexpr, stride_yl: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """The gradients of T * BLOCKS positions; one more block looks ahead, because x_s reaches s + K - 1.

    head keeps the first K - 1 gradients in front of the SiLU, for the initial state.
    """
    pid = tl.program_id(0)
    groups = tl.cdiv(d, BD)
    spans = tl.cdiv(length, T * BLOCKS)
    b = (pid // (groups * spans)).to(tl.int64)
    span = (pid // groups) % spans
    begin = span.to(tl.int64) * (T * BLOCKS)
    end = begin + T * BLOCKS
    t = begin
    channel = (pid % groups) * BD + tl.arange(0, BD)
    keep = channel < d
    taps = taps_of(weight, channel, keep, K)
    shift = tl.load(bias + channel, mask=keep, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    window = ()
    ahead = ()
    sums = (tl.zeros((BD,), tl.float32),)
    for j in tl.static_range(1, K):
        window = window + (
            past_row(x, initial, b, t - K + j, channel, keep, d, stride_xb, stride_xl, K, HAS_INITIAL),
        )
        ahead = ahead + (tl.zeros((BD,), tl.float32),)
        sums = sums + (tl.zeros((BD,), tl.float32),)
    total = tl.zeros((BD,), tl.float32)
    limit = tl.minimum(end + K - 1, length)
    x_at, dy_at = x + b * stride_xb + channel, dy + b * stride_yb + channel
    rows = loaded(x_at, stride_xl, t, limit, keep, T)
    grads = loaded(dy_at, stride_yl, t, limit, keep, T)
    for _ in range(BLOCKS + 1):
        # the next block is on its way while this one is worked on
        next_rows = loaded(x_at, stride_xl, t + T, limit, keep, T)
        next_grads = loaded(dy_at, stride_yl, t + T, limit, keep, T)
        for i in tl.static_range(T):
            window = window + (rows[i].to(tl.float32),)
            inner = window[K - 1] * taps[K - 1] + shift
            for j in tl.static_range(K - 1):
                inner += window[j] * taps[j]
            sigmoid = 1.0 / (1.0 + tl.exp(-inner))
            grad = grads[i].to(tl.float32) * sigmoid * (1.0 + inner * (1.0 - sigmoid))
            # g_{t - K + 1} to g_t, and x_{t - K + 1}'s gradient from them
            ahead = ahead + (grad,)
            out = tl.zeros((BD,), tl.float32)
            for j in tl.static_range(K):
                out += ahead[K - 1 - j] * taps[j]
            s = t + i - (K - 1)
            at = dx + (b * length + s) * d + channel
            tl.store(at, out.to(dx.dtype.element_ty), mask=keep & (s >= begin) & (s < length) & (s < end))
            own = tl.where(t + i < end, grad, 0.0)
            fresh = ()
            for j in tl.static_range(K):
                fresh = fresh + (sums[j] + own * window[j],)
            sums = fresh
            total += own
            if HAS_INITIAL:
                at = head + (b * (K - 1) + t + i) * d + channel
                tl.store(at, grad, mask=keep & (t + i < K - 1) & (t + i < end))
            window = window[1:]
            ahead = ahead[1:]
        rows, grads = next_rows, next_grads
        t += T
    at = (b * spans + span) * d + channel
    for j in tl.static_range(K):
        tl.store(dweight + at * K + j, sums[j], mask=keep)
    if HAS_BIAS:
        tl.store(dbias + at, total, mask=keep)
