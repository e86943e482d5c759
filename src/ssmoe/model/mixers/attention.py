"""Multi-head self-attention with rotary positions (arXiv 2104.09864) and a key-value state.

A document sees itself only: positions restart at starts, and the state keeps the last document's tokens.
Causal, or looking both ways for a masked objective; then a row must be given whole, and there is no state.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, CausalVariant

from ssmoe.model.init import init_weights
from ssmoe.model.layer import LayerOut
from ssmoe.model.norm import Linear
from ssmoe.ops import Ops, Segments, load
from ssmoe.ops.reference.attention_step import rotate


class AttentionState(NamedTuple):
    """keys, values: (b, h, c, d_head), rotated, tokens first and free room after them. length: (b,) int64."""

    keys: Tensor
    values: Tensor
    length: Tensor


class Attention(nn.Module):
    """Self-attention, without norm and residual. x: (b, l, d_model) -> (b, l, d_model).

    The state grows when its capacity is used up, so that a short capacity costs copies, never tokens.
    """

    batch_dependent = False

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        rope: bool = True,
        rope_base: float = 10_000.0,
        causal: bool = True,
        ops: Ops | None = None,
    ) -> None:
        super().__init__()
        self.ops = ops or load("auto")
        self.num_heads, self.d_head = num_heads, d_model // num_heads
        self.rope, self.rope_base, self.causal = rope, rope_base, causal
        self.qkv_proj = Linear(d_model, 3 * d_model)
        self.o_proj = Linear(d_model, d_model)
        init_weights(self)

    def forward(
        self, x: Tensor, state: AttentionState | tuple[()] | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """Attend inside each document; `state` None is an empty past."""
        past_state = state if isinstance(state, AttentionState) else None
        b, length, d_model = x.shape
        if length == 1 and self.causal and segments is None and past_state and not torch.is_grad_enabled():
            return self.append(x, copy_with_room(past_state, int(past_state.length.max()) + 1))
        q, k, v = self.qkv_proj(x).view(b, length, 3, self.num_heads, self.d_head).permute(2, 0, 3, 1, 4)
        past = torch.zeros(b, dtype=torch.int64, device=x.device) if past_state is None else past_state.length
        if self.rope:
            positions = _positions(past, length, segments)
            q, k = rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base)
        if not self.causal:
            y, state = _attend_both_ways(q, k, v, segments), ()
        elif past_state is None and segments is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            state = AttentionState(k, v, past + length)
        else:
            y, state = _attend(q, k, v, past_state, past, segments)
        return LayerOut(self.o_proj(y.transpose(1, 2).reshape(b, length, d_model)), state, None)

    def append(self, x: Tensor, state: AttentionState) -> LayerOut:
        """One position (b, 1, d_model) after `state`, which is overwritten; its room must not be used up.

        Nothing depends on how full the state is but values, so that a CUDA graph can capture it.
        """
        y = self.ops.attention_step(
            self.qkv_proj(x).squeeze(1), *state, rope_base=self.rope_base if self.rope else None
        )
        return LayerOut(self.o_proj(y).unsqueeze(1), state, None)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> AttentionState | tuple[()]:
        """An empty past with room for `capacity` tokens; nothing when looking both ways."""
        if not self.causal:
            return ()
        room = torch.zeros(batch, self.num_heads, capacity, self.d_head, dtype=dtype, device=device)
        return AttentionState(room, room.clone(), torch.zeros(batch, dtype=torch.int64, device=device))


def _positions(past: Tensor, length: int, segments: Segments | None) -> Tensor:
    """(b, l): how many tokens of its own document stand before each one."""
    if segments is None:
        return past.unsqueeze(1) + torch.arange(length, device=past.device)
    count = segments.real.to(torch.int64).cumsum(1)  # real tokens up to and including each
    before = torch.where(segments.resets, count - 1, torch.zeros_like(count)).cummax(1).values
    continues = segments.resets.to(torch.int64).cumsum(1) == 0
    return count - 1 - before + past.unsqueeze(1) * continues


def copy_with_room(state: AttentionState, room: int) -> AttentionState:
    """The state with room for `room` tokens, or as many as it holds, in dense memory of its own."""
    more = room - state.keys.shape[2]
    # a pad of nothing is the tensor itself, and both keep heads innermost where narrow ones lie so
    keys, values = (
        F.pad(t, (0, 0, 0, more)).contiguous() if more > 0 else t.clone(memory_format=torch.contiguous_format)
        for t in (state.keys, state.values)
    )
    return AttentionState(keys, values, state.length.clone())


def _attend_both_ways(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    if segments is None:
        return F.scaled_dot_product_attention(q, k, v)
    document = segments.resets.to(torch.int64).cumsum(1)
    mask = segments.real.unsqueeze(1) & (document.unsqueeze(1) == document.unsqueeze(2))
    # a padding query looks at itself, as below
    mask = mask | torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
    return y.masked_fill(~segments.real[:, None, :, None], 0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, past: Tensor, segments: Segments | None
) -> tuple[Tensor, AttentionState]:
    b, _, length, _ = q.shape
    capacity = 0 if state is None else state.keys.shape[2]
    if state is not None:
        k, v = torch.cat((state.keys, k), dim=2), torch.cat((state.values, v), dim=2)
        if segments is None and bool((past == capacity).all()):
            # no room between the past and the new tokens, as when a prompt is read in pieces
            mask = CausalBias(CausalVariant.LOWER_RIGHT, length, capacity + length)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), AttentionState(
                k, v, past + length
            )
    stored = torch.arange(capacity, device=q.device) < past.unsqueeze(1)  # (b, c)
    if segments is None:
        real = torch.ones(b, length, dtype=torch.bool, device=q.device)
        document = torch.zeros(b, length, dtype=torch.int64, device=q.device)
    else:
        real, document = segments.real, segments.resets.to(torch.int64).cumsum(1)
    valid = torch.cat((stored, real), dim=1)  # (b, c + l)
    documents = torch.cat((document.new_zeros(b, capacity), document), dim=1)  # (b, c + l)

    order = torch.arange(-capacity, length, device=q.device)
    causal = order <= order[capacity:].unsqueeze(1)  # (l, c + l)
    mask = causal & valid.unsqueeze(1) & (documents.unsqueeze(1) == document.unsqueeze(2))
    # a padding query would see nothing and give NaN; it looks at itself, and is zeroed below
    mask = mask | (order == order[capacity:].unsqueeze(1))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
    y = y.masked_fill(~real[:, None, :, None], 0)

    keep = valid & (documents == document[:, -1:])
    kept = keep.sum(1)
    room = max(capacity, int(kept.max()))
    first = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, :room, None]
    first = first.unsqueeze(1).expand(-1, q.shape[1], -1, q.shape[3])
    return y, AttentionState(k.gather(2, first), v.gather(2, first), kept)
