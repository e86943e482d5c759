"""The pieces that fix precision: a Linear that casts its weight to its input, and norms in float32."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmoe.ops import Ops
from ssmoe.ops.reference import linear


class Linear(nn.Module):
    """y = x W^T + bias, computed in x's dtype; the parameters keep theirs.

    weight: (d_out, d_in). x: (..., d_in) -> (..., d_out). product: the backend's `linear`, by `use_products`.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.product: Callable[..., Tensor] = linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        return self.product(x, self.weight, self.bias)


def use_products(module: nn.Module, ops: Ops) -> None:
    """Hand the matrix product of `ops` to every Linear in `module`."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.product = ops.linear


class LayerNorm(nn.Module):
    """Layer normalisation with scale and bias (arXiv 1607.06450), in float32 or wider."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_model), at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(
            x.to(dtype), self.weight.shape, self.weight.to(dtype), self.bias.to(dtype), self.eps
        )


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with scale (arXiv 1910.07467), in float32 or wider."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_model), at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)


class Float32Module(nn.Module):
    """A module whose floating tensors never go below float32, whatever `.to`, `.half` or `.bfloat16` asks.

    Moves between devices and casts up (`.double`) work as everywhere.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Module":
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrowed = result.is_floating_point() and result.dtype.itemsize < torch.float32.itemsize
            return tensor.to(device=result.device, dtype=torch.float32) if narrowed else result

        return super()._apply(keep_precision, recurse)
