"""A bank of linear maps: every token through its experts' matrices, added up with the router's weights.

y_t = sum_k weight_tk W_e x_t, e = expert_tk
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ssmoe.ops.reference.linear import linear


def expert_linear(x: Tensor, weight_bank: Tensor, *, expert: Tensor, weight: Tensor) -> Tensor:
    """Apply to each token its experts and return (t, d_out) in x's dtype.

    x: (t, d_in), float32, bfloat16 or float64. weight_bank: (e, d_out, d_in). expert: (t, k) int32, -1 for a
    dropped assignment or padding. weight: (t, k) float32. An expert without tokens gets a zero gradient.
    """
    return apply_bank(linear, x, weight_bank, expert, weight)


def apply_bank(
    product: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    weight_bank: Tensor,
    expert: Tensor,
    weight: Tensor,
) -> Tensor:
    """`expert_linear` with `product` for x W^T."""
    t, k = expert.shape
    assigned = expert.flatten().to(torch.int64)
    order = torch.argsort(assigned, stable=True)  # dropped ones first, then expert by expert
    counts = torch.bincount(assigned + 1, minlength=weight_bank.shape[0] + 1)
    rows = torch.split(x[order // k], [int(count) for count in counts])
    outputs = [x.new_zeros(rows[0].shape[0], weight_bank.shape[1])]
    outputs += [product(tokens, weight_bank[e]) for e, tokens in enumerate(rows[1:])]
    slots = x.new_zeros(t * k, weight_bank.shape[1]).index_copy(0, order, torch.cat(outputs))
    accumulate = torch.promote_types(x.dtype, torch.float32)
    return (
        (slots.view(t, k, weight_bank.shape[1]).to(accumulate) * weight.unsqueeze(-1).to(accumulate))
        .sum(1)
        .to(x.dtype)
    )
