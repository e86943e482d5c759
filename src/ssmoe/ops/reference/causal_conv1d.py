"""The depthwise causal convolution in front of the scan, with its SiLU (arXiv 2312.00752, figure 3).

y_t = silu(bias + sum_j weight_j x_{t - (k - 1) + j}), over the document's own real tokens
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.ops.reference.pool import read_state, write_state
from ssmoe.ops.segments import Segments


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
    """Convolve every channel along l and return (y, final_state).

    x: (b, l, d), float32, bfloat16 or float64. weight: (d, k). bias: (d,). initial_state: (b, d, k - 1), the
    tokens before x, oldest first, zeros if None; with `slots` (b,) int64 it is a pool (p, d, k - 1).
    y: (b, l, d) in x's dtype, zero on padding. final_state: (b, d, k - 1) in x's dtype, the window after
    each row's last real position, zeros where it reaches past a document's start. `out_state` (inference
    only) receives the final state, at `slots` if given, and may alias `initial_state`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    b, _, d = x.shape
    past = read_state(initial_state, slots, x.new_zeros(b, d, weight.shape[1] - 1)).transpose(1, 2)
    taps = weight.to(dtype)
    if segments is None:
        window = torch.cat((past, x), dim=1)
        y, state = _convolve(window.to(dtype), taps), window[:, x.shape[1] :]
    else:
        y, state = _convolve_segments(x, past, taps, segments)
    y = F.silu(y if bias is None else y + bias.to(dtype))
    if segments is not None:
        y = y.masked_fill(~segments.real.unsqueeze(-1), 0)
    return y.to(x.dtype), write_state(state.transpose(1, 2), slots, out_state)


def _convolve(window: Tensor, taps: Tensor) -> Tensor:
    """(b, k - 1 + l, d) -> (b, l, d)"""
    k = taps.shape[1]
    length = window.shape[1] - (k - 1)
    y = window[:, :length] * taps[:, 0]
    for j in range(1, k):
        y = y + window[:, j : j + length] * taps[:, j]
    return y


def _convolve_segments(x: Tensor, past: Tensor, taps: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Move each row's real tokens together, convolve inside each document, move them back."""
    b, length, d = x.shape
    k = taps.shape[1]
    order = torch.argsort((~segments.real).to(torch.int8), dim=1, stable=True)  # (b, l)
    compact = x.masked_fill(~segments.real.unsqueeze(-1), 0).gather(1, order.unsqueeze(-1).expand(-1, -1, d))
    window = torch.cat((past, compact), dim=1)  # (b, k - 1 + l, d)
    document = segments.resets.gather(1, order).to(torch.int64).cumsum(1)
    document = torch.cat((document.new_zeros(b, k - 1), document), dim=1)  # (b, k - 1 + l)

    own = document[:, k - 1 :]
    y = torch.zeros_like(compact, dtype=taps.dtype)
    for j in range(k):
        same = (document[:, j : j + length] == own).unsqueeze(-1)
        y = y + (window[:, j : j + length] * same).to(taps.dtype) * taps[:, j]
    y = torch.zeros_like(y).scatter(1, order.unsqueeze(-1).expand(-1, -1, d), y)

    count = segments.real.sum(1, keepdim=True)  # (b, 1)
    last = count + torch.arange(k - 1, device=x.device)  # (b, k - 1), the window of the last real token
    same = document.gather(1, last) == document.gather(1, count + (k - 2)) if k > 1 else last.bool()
    state = window.gather(1, last.unsqueeze(-1).expand(-1, -1, d)) * same.unsqueeze(-1)
    return y, state
