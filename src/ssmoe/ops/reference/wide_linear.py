"""The matrix product of a router: never below float32, whatever its input is."""

import torch.nn.functional as F
from torch import Tensor


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the weight's dtype, float32 or wider. x: (..., d_in), any float. weight: (d_out, d_in)."""
    return F.linear(x.to(weight.dtype), weight)


def fork_wide(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(x, `wide_linear` of it). Going on with the returned x lets a backend add the gradients in one pass."""
    return x, wide_linear(x, weight)
