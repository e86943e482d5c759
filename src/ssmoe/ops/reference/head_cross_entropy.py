"""The mean cross-entropy of a softmax over a vocabulary, without keeping logits."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.ops.reference.linear import linear

IGNORE = -100
"""A target that is not predicted."""

CHUNK = 2048
"""Rows whose logits live at a time."""

Product = Callable[..., Tensor]
"""A backend's `linear`."""


def head_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(x W^T + b) over the targets, () in float32 or wider, 0 without targets.

    x: (t, d), any floating dtype, in which products are computed. weight: (vocab, d). bias: (vocab,).
    targets: (t,) int64, `IGNORE` where nothing is predicted. Differentiable once. A chunk of logits lives only
    while it is used, so memory does not grow with tokens * vocabulary.
    """
    return chunked(linear, x, weight, bias, targets)


def chunked(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """`head_cross_entropy` with the matrix product of some backend."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        total = cast(Tensor, _HeadCrossEntropy.apply(x, weight, bias, targets, product))
    else:
        narrow = weight.to(x.dtype)
        losses = [
            _summed(_log_probabilities(x[rows], narrow, bias, product), targets[rows])
            for rows in _chunks(x.shape[0])
        ]
        total = torch.stack(losses).sum()
    return total / (targets != IGNORE).sum().clamp(min=1)


class _HeadCrossEntropy(torch.autograd.Function):
    """The gradients are formed in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, product: Product
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        narrow = weight.to(x.dtype)
        for rows in _chunks(x.shape[0]):
            log_p = _log_probabilities(x[rows], narrow, bias, product)
            total += _summed(log_p, targets[rows])
            dlogits = _logit_gradient(log_p, targets[rows], x.dtype)
            # rows that are not predicted are left out of the small factors, not of the large one
            counted = (targets[rows] != IGNORE).unsqueeze(1)
            dx[rows] = product(dlogits, narrow.t()) * counted
            dweight += product(dlogits.t(), (x[rows] * counted).t())
            if dbias is not None:
                dbias += (counted.to(dlogits.dtype).t() @ dlogits).squeeze(0)
        ctx.save_for_backward(dx, dweight, dbias)
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


def _chunks(tokens: int) -> list[slice]:
    return [slice(begin, begin + CHUNK) for begin in range(0, tokens, CHUNK)]


def _log_probabilities(x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    """(s, d) -> (s, vocab), float32 or wider"""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.log_softmax(product(x, weight, bias), dim=-1, dtype=dtype)


def _summed(log_p: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(log_p, targets, ignore_index=IGNORE, reduction="sum")


def _logit_gradient(log_p: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax - one_hot(target) in `dtype`, in the place of `log_p` where that is its dtype."""
    index = targets.clamp(min=0).unsqueeze(1)
    at_target = torch.expm1(log_p.gather(1, index)).to(dtype)
    out = log_p if log_p.dtype == dtype else torch.empty_like(log_p, dtype=dtype)
    return torch.exp(log_p, out=out).scatter_(1, index, at_target)
