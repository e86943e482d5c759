"""The selective scan of Mamba (arXiv 2312.00752, algorithm 2), token by token.

delta'_t = softplus(delta_t + delta_bias)
h_t = exp(delta'_t A) h_{t-1} + delta'_t B_t x_t
y_t = (<C_t, h_t> + D x_t) silu(z_t)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.ops.reference.pool import read_state, write_state
from ssmoe.ops.segments import Segments

# positions discretised together, so that exp(delta A) of a block stays in cache
_BLOCK = 32


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
    """Scan every channel along l and return (y, final_state).

    x, delta, z: (b, l, d), float32, bfloat16 or float64. A: (d, n), negative. B, C: (b, l, n). D,
    delta_bias: (d,). initial_state: (b, d, n), zeros if None; with `slots` (b,) int64 it is a pool (p, d, n).
    y: (b, l, d) in x's dtype, zero on padding. final_state: (b, d, n), after each row's last real position;
    float32, or float64 if x is. `out_state` (inference only) receives the final state, at `slots` if given,
    and may alias `initial_state`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    output_dtype = x.dtype
    x, delta, A, B, C = (t.to(dtype) for t in (x, delta, A, B, C))
    delta = F.softplus(delta if delta_bias is None else delta + delta_bias.to(dtype))
    if segments is not None:
        # a zero step on padding leaves the state as it is, whatever the padding holds
        padding = ~segments.real.unsqueeze(-1)
        x, delta, B, C = (t.masked_fill(padding, 0) for t in (x, delta, B, C))
    h = read_state(initial_state, slots, x.new_zeros(x.shape[0], *A.shape))
    y, h = _recurrence(x, delta, A, B, C, h, None if segments is None else segments.resets)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(
            z.to(dtype) if segments is None else z.to(dtype).masked_fill(~segments.real.unsqueeze(-1), 0)
        )
    return y.to(output_dtype), write_state(h, slots, out_state)


def _recurrence(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    outputs: list[Tensor] = []
    for begin in range(0, x.shape[1], _BLOCK):
        block = slice(begin, begin + _BLOCK)
        # time first, so that each step reads contiguous memory
        step = delta[:, block].transpose(0, 1).unsqueeze(-1)  # (s, b, d, 1)
        decay = torch.exp(step * A)  # (s, b, d, n)
        if resets is not None:
            decay = decay.masked_fill(resets[:, block].t()[:, :, None, None], 0)
        drive = step * x[:, block].transpose(0, 1).unsqueeze(-1) * B[:, block].transpose(0, 1).unsqueeze(2)
        states: list[Tensor] = []
        for decay_t, drive_t in zip(decay.unbind(0), drive.unbind(0), strict=True):
            h = torch.addcmul(drive_t, decay_t, h)
            states.append(h)
        outputs.append((torch.stack(states) @ C[:, block].transpose(0, 1).unsqueeze(-1)).squeeze(-1))
    return torch.cat(outputs).transpose(0, 1), h
