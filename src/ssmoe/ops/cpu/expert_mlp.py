"""The expert bank on the CPU: `ssmoe.ops.reference.expert_mlp`, sorted by expert, then in tasks of some rows.

A task (`csrc/experts.h`) gathers its rows, reads each weight once and keeps what lies between in cache.
Weights may be float32 under bfloat16 activations: they are narrowed as they are read, and their gradients are
float32.
"""

from typing import Any

import torch
from torch import Tensor

from ssmoe.ops.cpu.state import any_gradient
from ssmoe.ops.reference.expert_mlp import ACTIVATIONS

FEW = 8
"""Tokens up to which `csrc/expert_step.cpp` reads each chosen expert once, without gathering; of a
wider bank it casts those experts only."""


def expert_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    *,
    expert: Tensor,
    weight: Tensor,
    activation: str,
) -> Tensor:
    """Apply to each token its experts and return (t, d); see the reference for shapes and meaning."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of: {', '.join(ACTIVATIONS)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    banks = (up, down) if gate is None else (up, down, gate)
    if any(bank.dtype != wide for bank in banks):
        up, down = up.to(x.dtype), down.to(x.dtype)
        gate = None if gate is None else gate.to(x.dtype)
    weight = weight.to(wide)
    if x.shape[0] <= FEW and not torch.is_grad_enabled():
        return torch.ops.ssmoe.expert_step(x, up, down, gate, expert, weight, ACTIVATIONS.index(activation))
    keep = any_gradient(x, up, down, gate, weight)
    y, *_ = torch.ops.ssmoe.expert_mlp(x, up, down, gate, expert, weight, ACTIVATIONS.index(activation), keep)
    return y


def _expert_fake(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    expert: Tensor,
    weight: Tensor,
    activation: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (t, d), k, (e, f, _) = x.shape, expert.shape[1], up.shape
    order = x.new_empty(3 * t * k + e + 1, dtype=torch.int64)
    kept = t * k if keep else 0
    return x.new_empty(t, d), order, x.new_empty(kept, f), x.new_empty(0 if gate is None else kept, f)


def _expert_step_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _expert_backward_fake(
    dy: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    expert: Tensor,
    weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    e, f, d = up.shape
    return (
        x.new_empty(x.shape), up.new_empty(e, f, d), up.new_empty(e, d, f),
        up.new_empty(0 if gate is None else e, f, d), weight.new_empty(weight.shape),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    x, up, down, gate, expert, weight, order, hidden, gates = ctx.saved_tensors
    dx, dup, ddown, dgate, dweight = torch.ops.ssmoe.expert_mlp_backward(
        dy, x, up, down, gate, expert, weight, ctx.activation, order, hidden, gates
    )
    return dx, dup, ddown, None if gate is None else dgate, None, dweight, None, None


torch.library.register_fake("ssmoe::expert_mlp", _expert_fake)
torch.library.register_fake("ssmoe::expert_step", _expert_step_fake)
torch.library.register_fake("ssmoe::expert_mlp_backward", _expert_backward_fake)
torch.library.register_autograd("ssmoe::expert_mlp", _backward, setup_context=_save)
