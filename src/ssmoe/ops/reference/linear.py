"""The matrix product of every projection: y = x W^T + b, computed in x's dtype."""

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., d_in), any floating dtype; weight: (d_out, d_in); bias: (d_out,) -> (..., d_out), x's dtype.

    The parameters may be of another dtype, strided or transposed; their gradients come in their own.
    """
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
