"""The bank of linear maps on the CPU: the reference's, with the product of `ssmoe.ops.cpu.linear`."""

from torch import Tensor

from ssmoe.ops.cpu.linear import linear
from ssmoe.ops.reference.expert_linear import apply_bank


def expert_linear(x: Tensor, weight_bank: Tensor, *, expert: Tensor, weight: Tensor) -> Tensor:
    """x (t, d_in), weight_bank (e, d_out, d_in) -> (t, d_out); see the reference."""
    return apply_bank(linear, x, weight_bank, expert, weight)
