"""The causal convolution on a GPU: where each tap comes from, the custom op and its gradient."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.ops.reference.pool import read_state, write_state
from ssmoe.ops.segments import Segments
from ssmoe.ops.triton import conv_kernels as kernels
from ssmoe.ops.triton.column_sums import column_sums
from ssmoe.ops.triton.launch import (
    cdiv,
    check_activations,
    check_shape,
    direct,
    on_device,
    power_of_two,
    row_major,
    some,
    watched,
)

NONE = kernels.NONE.value
CHANNELS = 256
# the streaming kernels: channels and warps of a program, positions loaded together and blocks of them
STREAM = (512, 4, 8, 16)
STREAM_SPREAD = (256, 4, 8, 8)
"""Where the others are too few to fill a GPU, less than FULL."""
FULL = 1056
BACKWARD_CHANNELS = 512
BACKWARD_WARPS = 8
BACKWARD_BLOCK = (4, 32)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    slots: Tensor | None = None,
    out_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution of `ssmoe.ops.reference.causal_conv1d`, for float32 and bfloat16 activations.

    Two runs are bitwise equal: no kernel uses atomics.
    """
    check_activations(x=x)
    b, length, d = x.shape
    k = weight.shape[-1]
    check_shape(weight=(weight, (d, k)), bias=(bias, (d,)))
    if min(b, length, d, k) < 1 or k > 8:
        raise ValueError(f"x {tuple(x.shape)} with {k} taps: sizes start at 1 and there are at most 8 taps")
    past = None
    if initial_state is not None:
        past = read_state(initial_state, slots, x.new_empty((b, d, k - 1)))
    if segments is None and k > 1 and not watched(x):
        state = torch.empty(b, d, k - 1, dtype=x.dtype, device=x.device)
        return _streamed(x, weight, bias, past, state), write_state(state, slots, out_state)
    places = None
    if segments is not None:
        check_shape(ids=(segments.ids, (b, length)), starts=(segments.starts, (b, length)))
        places = segments.derived(f"places of {k} taps", lambda: _places(segments, k))
    y = direct(conv_forward, x)(
        x, weight, bias, past if k > 1 else None, *((None, None, None) if places is None else places[:3])
    )
    return y, write_state(_window(x, past, k, places), slots, out_state)


class _Places(NamedTuple):
    """Rows of x by number, rows of the initial state as -(k - 1) to -1, NONE where a document ends."""

    sources: Tensor  # (b, l, k), the row of each tap
    targets: Tensor  # (b, l, k), the position for which this row is tap j
    past_targets: Tensor  # (b, k - 1, k), the same for the rows of the initial state
    # of the final state (b, 1, k - 1): rows of x and where they count, the same of the initial state
    rows: Tensor
    inside: Tensor
    older: Tensor
    before: Tensor


def _places(segments: Segments, k: int) -> _Places:
    real = segments.real
    b, length = real.shape
    device = real.device
    # the initial state, then the real tokens moved together, then room to look ahead
    room = k - 1
    index = real.to(torch.int64).cumsum(1) - 1 + room  # (b, l)
    count = real.to(torch.int64).sum(1, keepdim=True)
    position = torch.full((b, room + length + room + 1), NONE, dtype=torch.int64, device=device)
    position[:, :room] = torch.arange(-room, 0, device=device)
    document = torch.full_like(position, -1)
    document[:, :room] = 0
    spare = position.shape[1] - 1
    slot = torch.where(real, index, spare)
    position = position.scatter(1, slot, torch.arange(length, device=device).expand(b, -1))
    document = document.scatter(1, slot, segments.resets.to(torch.int64).cumsum(1))
    position[:, spare] = NONE
    document[:, spare] = -1

    def look(start: Tensor, offsets: Tensor) -> Tensor:
        own = document.gather(1, start)  # (b, s)
        at = (start.unsqueeze(-1) + offsets).clamp(0, spare).flatten(1)
        same = document.gather(1, at).view(*start.shape, len(offsets)) == own.unsqueeze(-1)
        found = position.gather(1, at).view(*start.shape, len(offsets))
        return torch.where(same & (own >= 0).unsqueeze(-1), found, NONE).to(torch.int32)

    taps = torch.arange(k, device=device)
    past = torch.arange(room, device=device).expand(b, -1)
    last = (count + room - 1).clamp(min=0)
    window = look(last, torch.arange(1 - room, 1, device=device)).view(b, 1, room).to(torch.int64)
    return _Places(
        sources=look(slot, taps - room),
        targets=look(slot, room - taps),
        past_targets=look(past, room - taps),
        rows=window.clamp(min=0),
        inside=window >= 0,
        older=(window + room).clamp(0, max(room - 1, 0)),
        before=(window < 0) & (window > -k),
    )


def _window(x: Tensor, past: Tensor | None, k: int, places: _Places | None) -> Tensor:
    """(b, d, k - 1), the inputs that the next position will look back at."""
    b, length, d = x.shape
    if places is None:
        if length >= k - 1:
            return x[:, length - (k - 1) :].transpose(1, 2)
        past = x.new_zeros(b, d, k - 1) if past is None else past
        return torch.cat((past, x.transpose(1, 2)), dim=2)[:, :, length:]
    state = torch.where(places.inside, x.transpose(1, 2).gather(2, places.rows.expand(-1, d, -1)), 0)
    if past is not None and k > 1:
        state = torch.where(places.before, past.gather(2, places.older.expand(-1, d, -1)), state)
    return state


def _stream(b: int, length: int, d: int) -> tuple[int, tuple[int, int, int, int]]:
    """Programs of the streaming forward kernel, and how it is cut."""

    def programs(cut: tuple[int, int, int, int]) -> int:
        return b * cdiv(length, cut[2] * cut[3]) * cdiv(d, cut[0])

    cut = STREAM if programs(STREAM) >= FULL else STREAM_SPREAD
    return programs(cut), cut


def _streamed(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, final: Tensor | None
) -> Tensor:
    """The convolution of rows without segments; `final` (b, d, k - 1), where given, gets what comes next."""
    b, length, d = x.shape
    x = row_major(x)
    y = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    programs, (channels, warps, steps, blocks) = _stream(b, length, d)
    with on_device(x):
        kernels.stream_forward_kernel[(programs,)](
            x, *some(x, weight, bias, past), y, y if final is None else final, length, x.stride(0), d=d,
            stride_xl=x.stride(1), K=weight.shape[1], T=steps, BLOCKS=blocks, BD=channels,
            HAS_BIAS=bias is not None, HAS_INITIAL=past is not None, HAS_FINAL=final is not None,
            num_warps=warps,
        )  # fmt: skip
    return y


@torch.library.custom_op("ssmoe::conv_forward", mutates_args=())
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    sources: Tensor | None,
    targets: Tensor | None,
    past_targets: Tensor | None,
) -> Tensor:
    """silu(conv + bias); the tables are `_Places`' fields."""
    del targets, past_targets
    if sources is None and weight.shape[1] > 1:
        return _streamed(x, weight, bias, past, None)
    b, length, d = x.shape
    x = row_major(x)
    y = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    channels = min(CHANNELS, power_of_two(d))
    tile = 16
    with on_device(x):
        kernels.convolve_kernel[(b * cdiv(length, tile) * cdiv(d, channels),)](
            x, *some(x, weight, bias, past, sources), y, length, d, x.stride(0), x.stride(1),
            K=weight.shape[1], BT=tile, BD=channels, HAS_BIAS=bias is not None, HAS_INITIAL=past is not None,
            TABLE=sources is not None, FORWARD=True, num_warps=4,
        )  # fmt: skip
    return y


@conv_forward.register_fake
def _(x, weight, bias, past, sources, targets, past_targets):  # noqa: ARG001
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("ssmoe::conv_backward", mutates_args=())
def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    sources: Tensor | None,
    targets: Tensor | None,
    past_targets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial state, empty where there is no input."""
    b, length, d = x.shape
    k = weight.shape[1]
    x, dy = row_major(x), row_major(dy)
    streams = sources is None and k > 1
    channels = BACKWARD_CHANNELS if streams else min(CHANNELS, power_of_two(d))
    steps, blocks = BACKWARD_BLOCK if streams else (8, 16)
    if streams and k - 1 > steps:
        steps = power_of_two(k - 1)
    spans = b * cdiv(length, steps * blocks)
    grid = (spans * cdiv(d, channels),)
    like = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    dweight = torch.empty(spans, d, k, **like)
    dbias = torch.empty((spans, d) if bias is not None else (0,), **like)
    if streams:
        dinner = torch.empty((b, k - 1, d) if past is not None else (0,), **like)
    else:
        dinner = torch.empty_like(dx)
    constants = {"K": k, "BD": channels, "HAS_BIAS": bias is not None, "HAS_INITIAL": past is not None}
    with on_device(x):
        if streams:
            kernels.stream_backward_kernel[grid](
                x, *some(x, weight, bias, past), dy, dx, dinner, dweight, dbias, length, x.stride(0), dy.stride(0),
                d=d, stride_xl=x.stride(1), stride_yl=dy.stride(1), T=steps, BLOCKS=blocks,
                num_warps=BACKWARD_WARPS, **constants,
            )  # fmt: skip
        else:
            kernels.slope_kernel[grid](
                x, *some(x, weight, bias, past, sources), dy, dinner, dweight, dbias, length, d,
                x.stride(0), x.stride(1), dy.stride(0), dy.stride(1),
                BT=steps, TILES=blocks, TABLE=sources is not None, num_warps=4, **constants,
            )  # fmt: skip
            kernels.convolve_kernel[(b * cdiv(length, 16) * cdiv(d, channels),)](
                dinner, *some(x, weight, bias, past, targets), dx, length, d, dinner.stride(0), dinner.stride(1),
                K=k, BT=16, BD=channels, HAS_BIAS=False, HAS_INITIAL=False,
                TABLE=targets is not None, FORWARD=False, num_warps=4,
            )  # fmt: skip
    dpast = (
        x.new_empty(0)
        if past is None
        else _past_gradient(dinner, weight, past_targets, length).to(past.dtype)
    )
    sums = column_sums((dweight, weight.dtype), (dbias, dbias.dtype if bias is None else bias.dtype))
    return dx, *sums, dpast


def _past_gradient(dinner: Tensor, weight: Tensor, targets: Tensor | None, length: int) -> Tensor:
    """(b, d, k - 1): row i is tap j of position i - j, or of the one that the table names."""
    b, _, d = dinner.shape
    k = weight.shape[1]
    if targets is None:
        device = dinner.device
        at = torch.arange(k - 1, device=device)[:, None] - torch.arange(k, device=device)
        targets = torch.where(at < length, at, -1).expand(b, -1, -1)
    known = (targets >= 0).unsqueeze(-1)
    index = targets.clamp(min=0).to(torch.int64).flatten(1).unsqueeze(-1).expand(-1, -1, d)
    rows = dinner.gather(1, index).view(b, k - 1, k, d).float().masked_fill(~known, 0)
    return torch.einsum("bijd,dj->bdi", rows, weight.float())


@conv_backward.register_fake
def _(dy, x, weight, bias, past, sources, targets, past_targets):  # noqa: ARG001
    def like(t, present=True):
        return torch.empty(t.shape if present else (0,), dtype=t.dtype, device=x.device)

    empty = x.new_empty((0,), dtype=torch.float32)
    return (
        like(x),
        like(weight),
        empty if bias is None else like(bias),
        x.new_empty(0) if past is None else like(past),
    )


def _save(ctx, inputs, output):  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    saved = ctx.saved_tensors  # once: recomputation lets nobody ask twice
    _, _, bias, past, *_ = saved
    dx, dweight, dbias, dpast = conv_backward(dy, *saved)
    return dx, dweight, None if bias is None else dbias, None if past is None else dpast, None, None, None


conv_forward.register_autograd(_backward, setup_context=_save)
