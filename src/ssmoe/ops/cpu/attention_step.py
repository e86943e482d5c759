"""One token's attention by the C++ kernels: a cache is read once, in its own dtype."""

import torch
from torch import Tensor

from ssmoe.ops.reference.attention_step import append


def attention_step(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, *, rope_base: float | None
) -> Tensor:
    """`ssmoe.ops.reference.attention_step`; keys and values must be contiguous."""
    q = append(qkv, keys, values, length, rope_base=rope_base)
    wide = torch.promote_types(q.dtype, torch.float32)
    scaled = q.squeeze(2).to(wide) * q.shape[-1] ** -0.5
    return torch.ops.ssmoe.attend(scaled, keys, values, length)
