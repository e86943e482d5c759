"""The residual stack: layer after layer, and at length 1 every run of equal Mamba layers in one op."""

# nn.Module's dictionaries are read directly: its attribute look-up costs as much as a small layer
# pyright: reportPrivateUsage=false

from collections.abc import Callable, Sequence
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from ssmoe.model.feedforwards.moe import MoE
from ssmoe.model.layer import LayerOut, LayerState, RouterStats, State
from ssmoe.model.mixers.attention import Attention, AttentionState
from ssmoe.model.mixers.mamba import Mamba, MambaState
from ssmoe.model.norm import LayerNorm, RMSNorm
from ssmoe.ops import Ops, Segments


class Residual(nn.Module):
    """x + layer(norm(x)), the layer in `dtype`, the sum in x's dtype; one op for one position of a Mamba."""

    def __init__(self, norm: LayerNorm | RMSNorm, layer: nn.Module, ops: Ops) -> None:
        super().__init__()
        self.norm = norm
        self.layer = layer
        self.ops = ops

    def forward(
        self,
        x: Tensor,
        state: LayerState | None,
        segments: Segments | None,
        dtype: torch.dtype,
        *,
        out_state: LayerState | None = None,
    ) -> LayerOut:
        """x: (b, l, d_model) -> LayerOut with the new residual stream.

        out_state: where the new state is written, for one position; `state` itself, or of the same shapes.
        Attention adds to the keys and values that lie in it; what it shares with `state` is not copied.
        """
        if (
            x.shape[1] == 1
            and segments is None
            and not torch.is_grad_enabled()
            and isinstance(self.layer, Mamba)
        ):
            kept, new = cast(MambaState | None, state), cast(MambaState | None, out_state)
            return self.layer.step(x, self.norm, kept, dtype, out_state=new)
        x, normed = self.enter(x, None, dtype)
        out: LayerOut
        if isinstance(self.layer, Attention) and isinstance(out_state, AttentionState):
            write(out_state, cast(AttentionState, state))
            out = self.layer.append(normed, out_state)
        elif out_state is not None and isinstance(self.layer, MoE) and not self.layer.training:
            out = LayerOut(self.layer.step(normed), (), None)
        else:
            out = self.layer(normed, state, segments)
            if out_state is not None:
                write(out_state, out.state)
                out = out._replace(state=out_state)
        return LayerOut(x + out.x, out.state, out.stats)

    def enter(self, x: Tensor, pending: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x + pending, what the layer before has yet to add, and its norm: what this layer reads."""
        norm = self.norm
        return self.ops.residual_norm(x, norm.weight, norm.bias, eps=norm.eps, dtype=dtype, add=pending)


def write(place: LayerState, state: LayerState) -> None:
    """The values of `state` into the tensors of `place`, but for those that the two share."""
    for old, new in zip(place, state, strict=True):
        if old is not new:
            old.copy_(new)


def run(
    layers: Sequence[nn.Module],
    x: Tensor,
    state: State | None,
    segments: Segments | None,
    dtype: torch.dtype,
    *,
    out_state: State | None = None,
    take: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, State, tuple[RouterStats | None, ...]]:
    """x: (b, l, d_model) through all layers: stream, what is yet to be added to it, states, statistics.

    out_state as in `Residual`. take: of the result, what is wanted, such as the last position.
    """
    states: list[LayerState] = []
    stats: list[RouterStats | None] = []
    alone = x.shape[1] == 1 and segments is None and state is not None and not torch.is_grad_enabled()
    alone = alone and out_state is None
    joined = x.shape[1] > 1 and out_state is None
    pending: Tensor | None = None
    stream, ops = x.dtype, None
    i = 0
    while i < len(layers):
        count = _equal_mambas(layers, i, cast(State, state), dtype) if alone else 0
        if count > 1:
            x, found = _step(layers[i : i + count], x, cast(State, state)[i : i + count])
            states += found
            stats += [None] * count
            i += count
            continue
        before = None if state is None else state[i]
        layer = layers[i]
        if joined and _unwatched(layer):
            # the sum that ends a layer is formed where the next one reads it
            x, normed = layer.enter(x, pending, dtype)
            ops = layer.ops
            out: LayerOut = layer.layer(normed, before, segments)
            pending = out.x
            states.append(out.state)
            stats.append(out.stats)
            i += 1
            continue
        if pending is not None:
            assert ops is not None
            x, pending = ops.residual_sum(x, pending, dtype=stream), None
        # whatever wraps a layer need only know the four
        out = layer(x, before, segments, dtype, **({} if out_state is None else {"out_state": out_state[i]}))
        x = out.x
        states.append(out.state)
        stats.append(out.stats)
        i += 1
    if take is not None:
        x, pending = take(x), None if pending is None else take(pending)
    return x, pending, tuple(states), tuple(stats)


def _unwatched(layer: nn.Module) -> TypeGuard[Residual]:
    """Whether the layer is a plain one whose input and output nobody looks at or wraps."""
    if type(layer) is not Residual:
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


def _equal_mambas(layers: Sequence[nn.Module], begin: int, state: State, dtype: torch.dtype) -> int:
    """How many layers from `begin` on are plain Mamba sub-layers of one shape that nobody watches."""
    first: tuple[object, ...] | None = None
    for i in range(begin, len(layers)):
        layer = layers[i]
        if not _unwatched(layer):
            return i - begin
        norm, mixer = layer._modules["norm"], layer._modules["layer"]
        kept = state[i]
        if not isinstance(mixer, Mamba) or not isinstance(norm, RMSNorm | LayerNorm):
            return i - begin
        assert isinstance(kept, MambaState)
        if kept.conv.dtype != dtype:
            return i - begin
        shape = (type(norm), norm.eps, mixer.ops, mixer.dt_rank, kept.conv.shape, kept.ssm.shape)
        if first is not None and shape != first:
            return i - begin
        first = shape
    return len(layers) - begin


def _step(layers: Sequence[nn.Module], x: Tensor, state: State) -> tuple[Tensor, list[LayerState]]:
    plain = [cast(Residual, layer) for layer in layers]
    norms = [cast(RMSNorm | LayerNorm, layer._modules["norm"]) for layer in plain]
    mixers = [cast(Mamba, layer._modules["layer"]) for layer in plain]
    y, convs, ssms = mixers[0].ops.mamba_steps(
        x.squeeze(1),
        [mixer.step_weights(norm) for mixer, norm in zip(mixers, norms, strict=True)],
        norm_eps=norms[0].eps,
        conv_states=[cast(MambaState, kept).conv for kept in state],
        ssm_states=[cast(MambaState, kept).ssm for kept in state],
    )
    return y.unsqueeze(1), [MambaState(conv, ssm) for conv, ssm in zip(convs, ssms, strict=True)]
