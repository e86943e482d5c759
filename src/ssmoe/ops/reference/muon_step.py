"""Muon's update of many matrices of one shape: momentum, the nearest orthogonal matrix, decay, step.

M <- mu M + (1 - mu) G;  W <- (1 - rate decay) W - rate 0.2 sqrt(max(rows, columns)) O(mu M + (1 - mu) G)
(Jordan 2024, "Muon: an optimizer for hidden layers in neural networks"; the factor is arXiv 2502.16982,
equation 4: the update's root mean square is then AdamW's). O turns X = U S V^T into about U V^T by the
iteration X <- a X + (b A + c A^2) X with A = X X^T, after a division that brings S under 1.
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

MATCH_ADAMW = 0.2
"""Root mean square of AdamW's update, in learning rates (arXiv 2502.16982, section 2.2)."""
SMALLEST = 1e-7
"""Matrices of a smaller norm are not scaled up to 1; zeros stay zeros."""


class Iteration(NamedTuple):
    """coefficients: (a, b, c) of each pass. tight: divide by the root of |X X^T|_F instead of by |X|_F, both
    at least the largest singular value, the former by far the closer one of a matrix of high rank."""

    coefficients: tuple[tuple[float, float, float], ...]
    tight: bool


def muon_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    rate: float | Tensor,
    decay: float,
    mu: float,
    iteration: Iteration,
    products: torch.dtype | None = None,
) -> None:
    """Update parameters and momenta in place; each (n, rows, columns), with n of its own, and contiguous.

    rate: a number, or a tensor () on the device. products: what is multiplied in; None is the parameters'
    dtype, but bfloat16 on a GPU where that is float32.
    """
    first = parameters[0]
    sizes = [parameter.shape[0] for parameter in parameters]
    narrow = first.is_cuda and first.dtype == torch.float32
    dtype = products or (torch.bfloat16 if narrow else first.dtype)
    x = torch.empty((sum(sizes), *first.shape[1:]), dtype=dtype, device=first.device)
    for piece, gradient, momentum in zip(torch.split(x, sizes), gradients, momenta, strict=True):
        momentum.lerp_(gradient, 1 - mu)
        # Nesterov's step but for a factor, which the division takes out
        torch.add(momentum, gradient, alpha=1 / mu - 1, out=piece)
    x = orthogonalise(x, iteration)
    factor = MATCH_ADAMW * sqrt(max(first.shape[1:]))
    for piece, parameter in zip(torch.split(x, sizes), parameters, strict=True):
        if decay:
            parameter.mul_(1 - rate * decay)
        if isinstance(rate, Tensor):
            parameter.addcmul_(piece, rate, value=-factor)
        else:
            parameter.add_(piece, alpha=-factor * rate)


def orthogonalise(x: Tensor, iteration: Iteration) -> Tensor:
    """x: (n, rows, columns) -> the same shape and dtype, every singular value brought near 1."""
    tall = x.shape[1] > x.shape[2]
    gram = _gram(x, tall)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    bound = gram.flatten(1).square().sum(1).sqrt() if iteration.tight else diagonal.sum(1)
    scale = bound.clamp(min=SMALLEST**2).rsqrt().view(-1, 1, 1)
    x, gram = x * scale, gram * scale.square()
    for i, (a, b, c) in enumerate(iteration.coefficients):
        gram = gram if i == 0 else _gram(x, tall)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x


def _gram(x: Tensor, tall: bool) -> Tensor:
    return x.mT @ x if tall else x @ x.mT
