"""The scan's parameters, and the scan of documents that begin from a learned state.

The ops begin a document from zero. The scan is linear in its state, so a document that begins from h_0 inside
a row differs from one that begins from zero by exp(A sum delta') h_0, the sum over the document's own
positions so far: exact, and added here for every backend alike.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from ssmoe.model.norm import Float32Module
from ssmoe.ops import Ops, Segments

_BLOCK = 64
"""Positions whose exp(A sum delta') are held at once."""


class SSMParameters(Float32Module):
    """A_log, D and the delta bias, which stay float32 or wider; forward returns (A, D, delta_bias).

    A = -exp(A_log): (d_inner, d_state). D, delta_bias: (d_inner,). initial_state: (d_inner, d_state), what
    every document begins from, or None for zeros.
    """

    def __init__(
        self, d_inner: int, d_state: int, delta_range: tuple[float, float], *, learned_state: bool = False
    ) -> None:
        super().__init__()
        self.delta_range = delta_range
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.delta_bias = nn.Parameter(torch.empty(d_inner))
        self.initial_state = nn.Parameter(torch.empty(d_inner, d_state)) if learned_state else None

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, D and the delta bias."""
        return -torch.exp(self.A_log), self.D, self.delta_bias

    def start(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(b, d_inner, d_state): the state before a document, differentiable where it is learned."""
        if self.initial_state is None:
            return torch.zeros(batch, *self.A_log.shape, dtype=dtype, device=device)
        return self.initial_state.to(device, dtype).repeat(batch, 1, 1)


def scan(
    ops: Ops,
    parameters: SSMParameters,
    x: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    *,
    state: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """`ops.selective_scan` where documents, at the row's beginning and inside it, begin from what is learned.

    Shapes as there. A document that begins inside a row costs elementwise work of the size of the reference.
    """
    A, D, delta_bias = parameters()
    learned = parameters.initial_state
    inner = None
    if learned is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        start = parameters.start(x.shape[0], wide, x.device)
        state, segments, inner = _open(start, state, segments)
    y, final = ops.selective_scan(x, delta, A, B, C, D, z, delta_bias, initial_state=state, segments=segments)
    if learned is None or segments is None or inner is None:
        return y, final
    since, inside = _since(delta, delta_bias, segments, inner)
    final = final + torch.where(
        inside[:, -1, None, None], torch.exp(since[:, -1, :, None] * A) * learned, 0.0
    ).to(final.dtype)
    seen = (inside & segments.real).unsqueeze(-1)
    added = torch.cat([_read_out(part, read, A, learned) for part, read in _blocks(since, C)], dim=1)
    added = torch.where(seen, added * F.silu(z.to(added.dtype)), 0.0)
    return (y.to(added.dtype) + added).to(y.dtype), final


def _open(
    start: Tensor, state: Tensor | None, segments: Segments | None
) -> tuple[Tensor, Segments | None, Tensor | None]:
    """The state of each row before its first position, the segments without a start there, and inner starts.

    The last is None where no document begins inside a row.
    """
    if segments is None:
        return (start if state is None else state), None, None
    first = segments.real & (segments.real.cumsum(1) == 1)
    opens = (segments.resets & first).any(1)
    state = start if state is None else torch.where(opens[:, None, None], start.to(state.dtype), state)
    inner = segments.resets & ~first
    return state, Segments(segments.ids, inner), inner if bool(inner.any()) else None


def _since(delta: Tensor, delta_bias: Tensor, segments: Segments, inner: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of delta' (b, l, d) since the last inner start, that position included; where there is one."""
    wide = torch.promote_types(delta.dtype, torch.float32)
    step = F.softplus(delta.to(wide) + delta_bias.to(wide)).masked_fill(~segments.real.unsqueeze(-1), 0)
    # wider still, because the difference of two long sums is taken
    total = step.double().cumsum(1)
    column = torch.arange(step.shape[1], device=step.device).expand_as(inner)
    last = torch.where(inner, column, -1).cummax(1).values
    index = last.clamp(min=0).unsqueeze(-1).expand_as(step)
    before = (total - step).gather(1, index)
    return (total - before).to(wide), last >= 0


def _blocks(since: Tensor, C: Tensor) -> list[tuple[Tensor, Tensor]]:
    C = C.to(since.dtype)
    begins = range(0, C.shape[1], _BLOCK)
    return [(since[:, i : i + _BLOCK], C[:, i : i + _BLOCK]) for i in begins]


def _read_out(since: Tensor, C: Tensor, A: Tensor, learned: Tensor) -> Tensor:
    """<C_t, exp(since_t A) learned>: (b, s, d). What lies between is computed anew in the backward pass."""

    def read(since: Tensor, C: Tensor, A: Tensor, learned: Tensor) -> Tensor:
        states = torch.exp(since.unsqueeze(-1) * A) * learned  # (b, s, d, n)
        return (states @ C.unsqueeze(-1)).squeeze(-1)

    return cast(Any, checkpoint).checkpoint(read, since, C, A, learned, use_reentrant=False)
