"""The bank of linear maps on the CPU: `ssmoe.ops.reference.expert_linear`, all experts' products in one call.

Rows are gathered expert by expert, and `csrc/dense.cpp` multiplies all groups at once, forward and backward.
"""

from typing import Any, cast

import torch
from torch import Tensor

from ssmoe.ops.cpu.state import any_gradient

_FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def expert_linear(x: Tensor, weight_bank: Tensor, *, expert: Tensor, weight: Tensor) -> Tensor:
    """x (t, d_in), weight_bank (e, d_out, d_in) -> (t, d_out); see the reference."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"x has dtype {x.dtype}: use float32, bfloat16 or float64")
    wide = torch.promote_types(x.dtype, torch.float32)
    bank = weight_bank if weight_bank.dtype in (x.dtype, wide) else weight_bank.to(x.dtype)
    assigned = expert.flatten().to(torch.int64)
    # dropped ones first, then expert by expert
    counts = torch.bincount(assigned + 1, minlength=bank.shape[0] + 1)
    if counts.shape[0] > bank.shape[0] + 1:
        raise ValueError(f"expert {int(expert.max())} is not between -1 and {bank.shape[0] - 1}")
    offset = counts.cumsum(0) - counts[0]
    order = torch.argsort(assigned, stable=True)[int(counts[0]) :]
    weight = weight.to(wide)
    if any_gradient(x, bank, weight):
        return cast(Tensor, _ExpertLinear.apply(x, bank, weight, order, offset))
    return _combine(_rows(x, bank, weight, order, offset), weight, order)


def _rows(x: Tensor, bank: Tensor, weight: Tensor, order: Tensor, offset: Tensor) -> Tensor:
    """The products (rows, d_out), expert by expert."""
    sorted_x = x[order // weight.shape[1]]
    return torch.ops.ssmoe.grouped_product(sorted_x, bank.transpose(1, 2), offset, False, False)


def _combine(rows: Tensor, weight: Tensor | None, order: Tensor, shape: torch.Size | None = None) -> Tensor:
    """(rows, d) -> (t, d), the sum over each token's rows, weighed; shape of `weight` where there is none."""
    t, k = weight.shape if weight is not None else cast(torch.Size, shape)
    slots = rows.new_zeros(t * k, rows.shape[1]).index_copy_(0, order, rows).view(t, k, rows.shape[1])
    if weight is None:
        return slots.squeeze(1) if k == 1 else slots.sum(1, dtype=_wide(rows)).to(rows.dtype)
    return (slots.to(weight.dtype) * weight.unsqueeze(-1)).sum(1).to(rows.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bank: Tensor, weight: Tensor, order: Tensor, offset: Tensor) -> Tensor:
        rows = _rows(x, bank, weight, order, offset)
        ctx.save_for_backward(x, bank, weight, order, offset, rows)
        return _combine(rows, weight, order)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, bank, weight, order, offset, rows = ctx.saved_tensors
        (dy,) = grad_outputs
        to_x, to_bank, to_weight, *_ = ctx.needs_input_grad
        token = order // weight.shape[1]
        each = dy[token]
        share = weight.flatten()[order].unsqueeze(1)
        drows = (each.to(share.dtype) * share).to(x.dtype)
        dx = dbank = dweight = None
        if to_x:
            back = torch.ops.ssmoe.grouped_product(drows, bank, offset, False, False)
            dx = _combine(back, None, order, weight.shape)
        if to_bank:
            wide = bank.dtype == weight.dtype
            dbank = torch.ops.ssmoe.grouped_product(drows, x[token], offset, True, wide)
        if to_weight:
            dots = (each.to(share.dtype) * rows.to(share.dtype)).sum(1)
            dweight = weight.new_zeros(weight.numel()).index_copy_(0, order, dots).view_as(weight)
        return dx, dbank, dweight, None, None


def _fake(a: Tensor, b: Tensor, offset: Tensor, gradient: bool, wide: bool) -> Tensor:
    narrow = torch.bfloat16 if torch.bfloat16 in (a.dtype, b.dtype) else a.dtype
    dtype = torch.promote_types(narrow, torch.float32) if wide else narrow
    shape = (offset.shape[0] - 1, a.shape[1], b.shape[1]) if gradient else (a.shape[0], b.shape[2])
    return a.new_empty(shape, dtype=dtype)


torch.library.register_fake("ssmoe::grouped_product", _fake)
