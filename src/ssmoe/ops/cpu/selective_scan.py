"""The selective scan on the CPU: `ssmoe.ops.reference.selective_scan`, by the kernels of `csrc/scan.h`.

Float32 (float64 for float64 inputs) inside; the backward pass recomputes the states from one kept every 32
positions. exp is within 2 ulp.
"""

from typing import Any

import torch
from torch import Tensor

from ssmoe.ops.cpu.state import any_gradient, gathered, in_place, refuse_gradient
from ssmoe.ops.reference.pool import write_state
from ssmoe.ops.segments import Segments


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
    """Scan every channel along l and return (y, final_state); see the reference for shapes and meaning."""
    output_dtype = x.dtype
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not (delta.dtype == B.dtype == C.dtype == x.dtype and (z is None or z.dtype == x.dtype)):
        x, delta, B, C = (t.to(dtype) for t in (x, delta, B, C))
        z = None if z is None else z.to(dtype)
    A = A.to(dtype)
    D = None if D is None else D.to(dtype)
    delta_bias = None if delta_bias is None else delta_bias.to(dtype)
    ids, starts = (None, None) if segments is None else segments
    shape = (x.shape[0], *A.shape)
    keep = any_gradient(x, delta, A, B, C, D, z, delta_bias, initial_state)
    if out_state is not None:
        if keep:
            refuse_gradient()
        if in_place(initial_state, out_state, slots, shape, dtype):
            resume = initial_state is out_state
            y = torch.ops.ssmoe.selective_scan_into(
                x, delta, A, B, C, D, z, delta_bias, None if resume else initial_state, ids, starts, slots,
                resume, out_state,
            )  # fmt: skip
            return y.to(output_dtype), out_state
    initial_state = gathered(initial_state, slots, shape, dtype)
    y, state, _ = torch.ops.ssmoe.selective_scan(
        x, delta, A, B, C, D, z, delta_bias, initial_state, ids, starts, keep
    )
    return y.to(output_dtype), write_state(state, slots, out_state)


# positions between kept states (kChunk of csrc/kernels.h), and channels in a vector of this machine
_CHUNK = 32
_LANES = {
    dtype: torch.ops.ssmoe.cpu_lanes(dtype == torch.float64) for dtype in (torch.float32, torch.float64)
}


def _scan_fake(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, ids: Tensor | None, starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, l, d = x.shape
    y = x.new_empty(b, l, d)
    state = A.new_empty(b, *A.shape)
    lanes = _LANES[A.dtype]
    kept = b * ((l + _CHUNK - 1) // _CHUNK) * ((d + lanes - 1) // lanes * lanes) * A.shape[1] if keep else 0
    return y, state, A.new_empty(kept)


def _scan_into_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _scan_backward_fake(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    b, l, d = x.shape
    vector = A.new_empty(d)
    return (
        x.new_empty(b, l, d), x.new_empty(b, l, d), A.new_empty(A.shape), B.new_empty(B.shape),
        C.new_empty(C.shape), vector, x.new_empty(0 if z is None else b, l, d), torch.empty_like(vector),
        A.new_empty(b, *A.shape),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, delta, A, B, C, D, z, delta_bias, initial_state, ids, starts, _ = inputs
    ctx.save_for_backward(x, delta, A, B, C, D, z, delta_bias, ids, starts, output[2])
    ctx.has_initial = initial_state is not None
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, delta, A, B, C, D, z, delta_bias, ids, starts, checkpoints = ctx.saved_tensors
    dx, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = torch.ops.ssmoe.selective_scan_backward(
        dy, dfinal, x, delta, A, B, C, D, z, delta_bias, ids, starts, checkpoints
    )
    return (
        dx, ddelta, dA, dB, dC, None if D is None else dD, None if z is None else dz,
        None if delta_bias is None else dbias, dinitial if ctx.has_initial else None, None, None, None,
    )  # fmt: skip


torch.library.register_fake("ssmoe::selective_scan", _scan_fake)
torch.library.register_fake("ssmoe::selective_scan_into", _scan_into_fake)
torch.library.register_fake("ssmoe::selective_scan_backward", _scan_backward_fake)
torch.library.register_autograd("ssmoe::selective_scan", _backward, setup_context=_save)
