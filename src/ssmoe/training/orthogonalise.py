"""The nearest orthogonal matrix, about: Newton-Schulz on many matrices at once.

X = U S V^T becomes U S' V^T with S' between about 0.7 and 1.2 (Jordan 2024, "Muon: an optimizer for hidden
layers in neural networks"): after division by the Frobenius norm, X <- a X + (b G + c G^2) X with G = X X^T,
five times. The coefficients are Jordan's, chosen for a steep start rather than for convergence to 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5
"""(a, b, c) of each iteration."""
EPS = 1e-7
"""A matrix of a smaller norm is not scaled up to 1; zeros stay zeros."""


def orthogonalise(x: Tensor) -> Tensor:
    """x: (n, rows, columns) -> the same shape and dtype.

    The products are batched, of the smaller of rows x rows and columns x columns, and taken in x's dtype.
    """
    tall = x.shape[1] > x.shape[2]
    x = F.normalize(x.flatten(1), dim=1, eps=EPS).view_as(x)
    for a, b, c in COEFFICIENTS:
        gram = x.mT @ x if tall else x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x


def flops(n: int, rows: int, columns: int) -> int:
    """Of `orthogonalise`, a multiply-add as two."""
    small, large = min(rows, columns), max(rows, columns)
    return len(COEFFICIENTS) * n * 2 * (2 * small**2 * large + small**3)
