"""Projections whose outputs or inputs have several readers, so that a backend can join their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmoe.ops.reference.linear import linear


def split_linear(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """x W^T cut along its last axis into pieces of `sizes`; x: (..., d_in), weight: (sum(sizes), d_in)."""
    return tuple(torch.split(linear(x, weight), list(sizes), dim=-1))


def fork_linear(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(x, x W^T). Going on with the returned x lets a backend add the gradients where it forms the second."""
    return x, linear(x, weight)
