"""Cross-entropy of the head without keeping logits, and its sum with the routers' losses."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.model.layer import RouterStats

IGNORE = -100
"""A target that is not predicted."""

_CHUNK = 2048


class Loss(NamedTuple):
    """total: () what to minimise, lm + balance + z. lm: () mean cross-entropy in nats over the targets.

    balance, z: () sums over the layers, coefficients applied. tokens: () int64, targets that count.
    """

    total: Tensor
    lm: Tensor
    balance: Tensor
    z: Tensor
    tokens: Tensor


def model_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, stats: Sequence[RouterStats]
) -> Loss:
    """x: (b, l, d), the head's input; weight: (vocab, d); targets: (b, l) int64, `IGNORE` where not predicted."""
    flat = targets.reshape(-1)
    tokens = (flat != IGNORE).sum()
    keep_gradients = torch.is_grad_enabled()
    total = _HeadCrossEntropy.apply(x.reshape(flat.shape[0], -1), weight, bias, flat, keep_gradients)
    lm = total / tokens.clamp(min=1)
    balance = sum((s.balance for s in stats), start=lm.new_zeros(()))
    z = sum((s.z for s in stats), start=lm.new_zeros(()))
    return Loss(lm + balance + z, lm, balance, z, tokens)


class _HeadCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of softmax(x W^T + b), chunk by chunk; gradients are formed in the forward pass.

    A chunk of logits lives only while it is used, so memory does not grow with tokens * vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, keep_gradients: bool
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        cast, cast_bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        total = torch.zeros((), dtype=wide, device=x.device)
        if keep_gradients:
            dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
            dbias = torch.zeros_like(weight[:, 0], dtype=wide)
        for begin in range(0, x.shape[0], _CHUNK):
            rows = slice(begin, begin + _CHUNK)
            logits = F.linear(x[rows], cast, cast_bias).to(wide)
            total += F.cross_entropy(logits, targets[rows], ignore_index=IGNORE, reduction="sum")
            if keep_gradients:
                gradient = _logit_gradient(logits, targets[rows])
                narrow = gradient.to(x.dtype)
                dx[rows] = narrow @ cast
                dweight += narrow.t() @ x[rows]
                dbias += gradient.sum(0)
        if keep_gradients:
            ctx.save_for_backward(dx, dweight, dbias if bias is not None else None)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        scale = grad_outputs[0]
        dx, dweight, dbias = ctx.saved_tensors
        return (
            dx * scale.to(dx.dtype),
            (dweight * scale).to(ctx.weight_dtype),
            None if dbias is None else (dbias * scale).to(ctx.weight_dtype),
            None,
            None,
        )


def _logit_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    counted = targets != IGNORE
    gradient = logits.softmax(dim=-1)
    index = targets.masked_fill(~counted, 0).unsqueeze(1)
    gradient.scatter_add_(1, index, -torch.ones_like(index, dtype=gradient.dtype))
    return gradient * counted.unsqueeze(1)
