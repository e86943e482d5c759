"""The causal convolution and its SiLU on the CPU: `ssmoe.ops.reference.causal_conv1d`, by `csrc/conv.h`."""

from typing import Any

import torch
from torch import Tensor

from ssmoe.ops.cpu.state import any_gradient, gathered, in_place, refuse_gradient
from ssmoe.ops.reference.pool import write_state
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
    """Convolve every channel along l and return (y, final_state); the reference has shapes and meaning."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    ids, starts = (None, None) if segments is None else segments
    shape = (x.shape[0], weight.shape[0], weight.shape[1] - 1)
    if out_state is not None:
        if any_gradient(x, weight, bias, initial_state):
            refuse_gradient()
        if in_place(initial_state, out_state, slots, shape, x.dtype):
            resume = initial_state is out_state
            y = torch.ops.ssmoe.causal_conv1d_into(
                x, weight, bias, None if resume else initial_state, ids, starts, slots, resume, out_state
            )
            return y, out_state
    initial_state = gathered(initial_state, slots, shape, x.dtype)
    y, state = torch.ops.ssmoe.causal_conv1d(x, weight, bias, initial_state, ids, starts)
    return y, write_state(state, slots, out_state)


def _conv_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, l, d = x.shape
    return x.new_empty(b, l, d), x.new_empty(b, d, weight.shape[1] - 1)


def _conv_into_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _conv_backward_fake(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    b, l, d = x.shape
    state = x.new_empty(b, d, weight.shape[1] - 1)
    return x.new_empty(b, l, d), weight.new_empty(weight.shape), weight.new_empty(d), state


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, ids, starts = ctx.saved_tensors
    dx, dweight, dbias, dinitial = torch.ops.ssmoe.causal_conv1d_backward(
        dy, dfinal, x, weight, bias, initial_state, ids, starts
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if initial_state is None else dinitial,
        None,
        None,
    )


torch.library.register_fake("ssmoe::causal_conv1d", _conv_fake)
torch.library.register_fake("ssmoe::causal_conv1d_into", _conv_into_fake)
torch.library.register_fake("ssmoe::causal_conv1d_backward", _conv_backward_fake)
torch.library.register_autograd("ssmoe::causal_conv1d", _backward, setup_context=_save)
