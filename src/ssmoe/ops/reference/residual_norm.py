"""The residual stream and its normalised copy: what every layer of a pre-normed stack begins with."""

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype,
    add: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x + add, norm(x + add) in `dtype`), the norm in float32 or wider.

    x: (..., d). add: (..., d), nothing if None. weight, bias: (d,). With a bias layer normalisation
    (arXiv 1607.06450), without one root-mean-square normalisation (arXiv 1910.07467). Going on with the
    returned x lets a backend add the two gradients where it forms the second.
    """
    x = x if add is None else x + add
    wide = torch.promote_types(x.dtype, torch.float32)
    if bias is None:
        y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    else:
        y = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return x, y.to(dtype)
