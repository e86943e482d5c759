"""The selective scan on a GPU: checks, the custom op with its gradient, and how the kernels are launched."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.ops.reference.pool import read_state, write_state
from ssmoe.ops.segments import Segments
from ssmoe.ops.triton import scan_cuda
from ssmoe.ops.triton import scan_kernels as kernels
from ssmoe.ops.triton.launch import (
    cdiv,
    check_activations,
    check_shape,
    direct,
    on_device,
    power_of_two,
    row_major,
    some,
)
from ssmoe.ops.triton.scan_gradient import Sums, carries, fake_outputs, register

# positions between two saved states; the backward replays this many from registers
CHECKPOINT = 4
FORWARD_CHANNELS = 32
FORWARD_REGISTERS = 128
# the backward is cheaper by the channel with 32, but 16 give twice the warps
BACKWARD_CHANNELS = 32
FEW_CHANNELS = 16
# warps that keep the chip busy: four (forward) and two (backward) a scheduler
FULL = 2112


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
    slots: Tensor | None = None,
    out_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The selective scan of `ssmoe.ops.reference.selective_scan`, for float32 and bfloat16 activations.

    State widths of 8, 16 and 32 take the kernels of `scan.cu` on a GPU that has NVRTC (`scan_cuda.covers`), all
    others the Triton kernels. Two runs are bitwise equal: no kernel uses atomics.
    """
    check_activations(x=x, delta=delta, z=z, B=B, C=C)
    b, length, d = x.shape
    n = A.shape[-1]
    check_shape(x=(x, (b, length, d)), delta=(delta, (b, length, d)), z=(z, (b, length, d)), A=(A, (d, n)))
    check_shape(B=(B, (b, length, n)), C=(C, (b, length, n)), D=(D, (d,)), delta_bias=(delta_bias, (d,)))
    if min(b, length, d, n) < 1 or n > 256:
        raise ValueError(
            f"x {tuple(x.shape)} with state width {n}: sizes start at 1 and the state width ends at 256"
        )
    initial = None
    if initial_state is not None:
        initial = read_state(initial_state, slots, x.new_empty((b, d, n), dtype=torch.float32))
    flags = None
    if segments is not None:
        check_shape(ids=(segments.ids, (b, length)), starts=(segments.starts, (b, length)))
        flags = segments.derived("flags", lambda: _flags(segments))
    tensors = (x, delta, A, B, C, D, z, delta_bias, initial)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if scan_cuda.covers(x, A):
        y, final, _ = direct(scan_cuda.scan_cuda, x)(*tensors, flags, save)
        return y, write_state(final, slots, out_state)
    # with gradients the gate is its own pass: inside the backward scan it would cost far more than it reads
    apart = save and z is not None
    fused = None if apart else z
    y, final, _ = scan_forward(x, delta, A, B, C, D, fused, delta_bias, initial, flags, save, apart)
    if apart:
        # between the two, y and its gradient stay float32: one rounding, as when the gate is fused
        y = gate_forward(y, z if z.dtype == x.dtype else z.float(), flags).to(x.dtype)
    return y, write_state(final, slots, out_state)


def _flags(segments: Segments) -> Tensor:
    return segments.real.to(torch.int8) + 2 * segments.resets.to(torch.int8)


class _Plan(NamedTuple):
    """How the length is cut: blocks of T positions, chunks of blocks that run side by side."""

    t: int
    blocks: int
    chunks: int
    chunk_blocks: int


def _plan(b: int, length: int, d: int, channels: int, *, below: int) -> _Plan:
    """Chunks that together make FULL warps, where there would be fewer than `below`; each costs another pass."""
    blocks = cdiv(length, CHECKPOINT)
    warps = b * cdiv(d, channels)
    chunks = max(1, min(FULL // warps, blocks // 16)) if warps < below else 1
    chunk_blocks = cdiv(blocks, chunks)
    return _Plan(CHECKPOINT, blocks, cdiv(blocks, chunk_blocks), chunk_blocks)


def _backward_channels(b: int, d: int) -> int:
    """Few channels a warp where the many would leave schedulers idle and chunks would not pay."""
    warps = b * cdiv(d, BACKWARD_CHANNELS)
    return FEW_CHANNELS if FULL // 8 <= warps < FULL // 2 else BACKWARD_CHANNELS


def _pack(B: Tensor, C: Tensor, flags: Tensor | None) -> Tensor:
    b, length, n = B.shape
    width = power_of_two(n)
    packed = torch.empty(b, length, 2 * width, dtype=torch.float32, device=B.device)
    B, C = row_major(B), row_major(C)
    tile = max(1, 1024 // width)
    kernels.pack_kernel[(cdiv(b * length, tile),)](
        B, C, packed if flags is None else flags, packed, b * length, length, B.stride(0), B.stride(1), C.stride(0), C.stride(1),
        N=n, NP=width, ROWS=tile, SEGMENTS=flags is not None, num_warps=4,
    )  # fmt: skip
    return packed


@torch.library.custom_op("ssmoe::scan_forward", mutates_args=())
def scan_forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    flags: Tensor | None,
    save: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, float32 if `wide`, final_state, the states at every CHECKPOINT-th position if `save`)."""
    b, length, d = x.shape
    n = A.shape[1]
    plan = _plan(b, length, d, FORWARD_CHANNELS, below=FULL // 2)
    x, delta, z = row_major(x), row_major(delta), None if z is None else row_major(z)
    like = {"dtype": torch.float32, "device": x.device}
    y = torch.empty(b, length, d, dtype=torch.float32 if wide else x.dtype, device=x.device)
    final = torch.empty(b, d, n, **like)
    checkpoints = torch.empty((b, plan.blocks, d, n) if save else (0,), **like)
    states, steps = carries(x, n, plan.chunks)
    zz = x if z is None else z
    constants = {
        "d": d, "stride_xl": x.stride(1), "stride_dl": delta.stride(1), "stride_zl": zz.stride(1),
        "N": n, "NP": power_of_two(n), "BD": FORWARD_CHANNELS, "T": plan.t,
        "EVEN": length % plan.t == 0, "HAS_Z": z is not None, "HAS_SKIP": D is not None,
        "HAS_BIAS": delta_bias is not None, "HAS_INITIAL": initial is not None,
        "SEGMENTS": flags is not None, "CHUNKED": plan.chunks > 1, "num_warps": 1, "num_stages": 1,
        "maxnreg": FORWARD_REGISTERS,
    }  # fmt: skip
    initial = None if initial is None else initial.contiguous()
    with on_device(x):
        packed = _pack(B, C, flags)
        scaled = (A.to(torch.float32) * kernels.LOG2E.value).t().contiguous()
        arguments = (
            x, delta, zz, packed, scaled, *some(x, D, delta_bias, initial, flags), y, checkpoints, final, states, steps,
            length, d, 0, plan.blocks, plan.chunks, plan.chunk_blocks, x.stride(0), delta.stride(0), zz.stride(0),
        )  # fmt: skip
        groups = cdiv(d, FORWARD_CHANNELS)
        if plan.chunks > 1:
            kernels.forward_kernel[(groups * (plan.chunks - 1) * b,)](
                *arguments, SAVE=False, LOCAL=True, **constants
            )
            _combine(A, initial, states, steps, flags is not None, reverse=False)
        kernels.forward_kernel[(groups * plan.chunks * b,)](*arguments, SAVE=save, LOCAL=False, **constants)
    return y, final, checkpoints


def _combine(
    A: Tensor, initial: Tensor | None, states: Tensor, steps: Tensor, segments: bool, *, reverse: bool
):
    b, chunks, d, n = states.shape
    kernels.combine_kernel[(cdiv(d, 8), b)](
        A.contiguous(), *some(A, initial), states, steps, d, chunks, N=n, NP=power_of_two(n), BD=8, T=8,
        HAS_INITIAL=initial is not None, SEGMENTS=segments, REVERSE=reverse, num_warps=1,
    )  # fmt: skip


@scan_forward.register_fake
def _(x, delta, A, B, C, D, z, delta_bias, initial, flags, save, wide):  # noqa: ARG001
    return fake_outputs(x, A, save, CHECKPOINT, torch.float32 if wide else x.dtype)


@torch.library.custom_op("ssmoe::scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    flags: Tensor | None,
    checkpoints: Tensor,
    initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`scan_gradient.Gradients`."""
    assert z is None, "with gradients the gate is gate_forward's"
    b, length, d = x.shape
    n = A.shape[1]
    width = power_of_two(n)
    channels = _backward_channels(b, d)
    plan = _plan(b, length, d, channels, below=FULL // 8)
    x, delta, dy = row_major(x), row_major(delta), row_major(dy)
    dfinal = dfinal.contiguous()
    groups = cdiv(d, channels)
    like = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    ddelta = torch.empty(b, length, d, dtype=delta.dtype, device=x.device)
    dpacked = torch.empty(groups, b, length, 2 * width, **like)
    sums = Sums.empty(x, n, plan.chunks, D, delta_bias, initial)
    states, steps = carries(x, n, plan.chunks)
    constants = {
        "d": d, "stride_xl": x.stride(1), "stride_dl": delta.stride(1), "stride_yl": dy.stride(1),
        "N": n, "NP": width, "BD": channels, "T": plan.t,
        "EVEN": length % plan.t == 0, "HAS_SKIP": D is not None,
        "HAS_BIAS": delta_bias is not None, "HAS_INITIAL": initial, "SEGMENTS": flags is not None,
        "CHUNKED": plan.chunks > 1, "num_warps": 1, "num_stages": 1,
    }  # fmt: skip
    with on_device(x):
        packed = _pack(B, C, flags)
        arguments = (
            x, delta, packed, A.contiguous(), *some(x, D, delta_bias, flags), checkpoints, dy, dfinal, states, steps,
            dx, ddelta, dpacked, *sums,
            length, b, 0, plan.blocks, plan.chunks, plan.chunk_blocks,
            x.stride(0), delta.stride(0), dy.stride(0),
        )  # fmt: skip
        if plan.chunks > 1:
            kernels.backward_kernel[(groups * (plan.chunks - 1) * b,)](*arguments, LOCAL=True, **constants)
            _combine(A, dfinal, states, steps, flags is not None, reverse=True)
        kernels.backward_kernel[(groups * plan.chunks * b,)](*arguments, LOCAL=False, **constants)
    dpacked = dpacked.sum(0)
    dB = dpacked[..., :n].to(B.dtype, copy=True)
    dC = dpacked[..., width : width + n].to(C.dtype, copy=True)
    dA, dD, dbias = sums.totals(A, D, delta_bias)
    return dx, ddelta, dA, dB, dC, dD, x.new_empty(0), dbias, sums.dinitial


register(scan_forward, scan_backward)


def _gate(y: Tensor, z: Tensor, flags: Tensor | None, dout: Tensor | None, out: Tensor, dz: Tensor) -> None:
    b, length, d = y.shape
    z = row_major(z)
    given = y if dout is None else row_major(dout)
    width = min(512, power_of_two(d))
    with on_device(y):
        kernels.gate_kernel[(cdiv(b * length, 4) * cdiv(d, width),)](
            y, z, *some(y, flags), given, out, dz, b * length, length,
            z.stride(0), z.stride(1), given.stride(0), given.stride(1),
            d=d, BT=4, BD=width, SEGMENTS=flags is not None, BACKWARD=dout is not None, num_warps=4,
        )  # fmt: skip


@torch.library.custom_op("ssmoe::gate_forward", mutates_args=())
def gate_forward(y: Tensor, z: Tensor, flags: Tensor | None) -> Tensor:
    """y silu(z) in z's dtype for y (b, l, d), zero on padding."""
    out = torch.empty(y.shape, dtype=z.dtype, device=y.device)
    _gate(y.contiguous(), z, flags, None, out, out)
    return out


@gate_forward.register_fake
def _(y, z, flags):  # noqa: ARG001
    return torch.empty(y.shape, dtype=z.dtype, device=y.device)


@torch.library.custom_op("ssmoe::gate_backward", mutates_args=())
def gate_backward(dout: Tensor, y: Tensor, z: Tensor, flags: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of y and z."""
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    _gate(y.contiguous(), z, flags, dout, dy, dz)
    return dy, dz


@gate_backward.register_fake
def _(dout, y, z, flags):  # noqa: ARG001
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    return dy, torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _save_gate(ctx, inputs, output):  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward_gate(ctx, dout):
    return *gate_backward(dout, *ctx.saved_tensors), None


gate_forward.register_autograd(_backward_gate, setup_context=_save_gate)
