"""Normalisation of rows: layer norm (arXiv 1607.06450) or, without a bias, RMS norm (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., d) of any floating dtype -> (..., d) in `dtype`, computed in float32 or wider.

    With a bias (d,): (x - mean) / sqrt(variance + eps) * weight + bias; without: x / sqrt(mean square + eps)
    * weight.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if bias is None:
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(dtype)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype)
