"""The end of the residual stream: the last layer's output added, in the dtype that the head reads."""

import torch
from torch import Tensor


def residual_sum(x: Tensor, add: Tensor, *, dtype: torch.dtype) -> Tensor:
    """x + add (...), rounded to x's dtype and then to `dtype`."""
    return (x + add).to(dtype)
