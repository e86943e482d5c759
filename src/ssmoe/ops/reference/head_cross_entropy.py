"""The mean cross-entropy of a softmax over a vocabulary, without keeping logits."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ssmoe.ops.reference.cross_entropy import IGNORE, cross_entropy
from ssmoe.ops.reference.linear import linear

CHUNK = {"cpu": 2048, "cuda": 8192}
"""Rows of logits that live at one time, by kind of device; elsewhere as on a CPU."""

Op = Callable[..., Any]


def head_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(x W^T + b) over the targets, () in float32 or wider, 0 without targets.

    x: (t, d), any floating dtype, in which products are computed. weight: (vocab, d). bias: (vocab,).
    targets: (t,) int64, `IGNORE` where nothing is predicted. Differentiable once. A chunk of logits lives
    only while it is used, so memory does not grow with tokens * vocabulary.
    """
    return composed(linear, cross_entropy, x, weight, bias, targets)


def composed(
    linear: Op, cross_entropy: Op, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """`head_cross_entropy` out of a backend's finer ops."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        total = cast(Tensor, _HeadCrossEntropy.apply(x, weight, bias, targets, linear, cross_entropy))
    else:
        narrow = weight.to(x.dtype)
        losses = [
            cross_entropy(linear(x[rows], narrow, bias), targets[rows], gradient=False)[0].sum()
            for rows in _chunks(x)
        ]
        total = torch.stack(losses).sum()
    return total / (targets != IGNORE).sum().clamp(min=1)


class _HeadCrossEntropy(torch.autograd.Function):
    """The gradients are formed in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        linear: Op,
        cross_entropy: Op,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        narrow = weight.to(x.dtype)
        for rows in _chunks(x):
            loss, dlogits = cross_entropy(linear(x[rows], narrow, bias), targets[rows], gradient=True)
            total += loss.sum()
            dx[rows] = linear(dlogits, narrow.t())
            dweight += linear(dlogits.t(), x[rows].t())
            if dbias is not None:
                dbias += (dlogits.new_ones(1, dlogits.shape[0]) @ dlogits).squeeze(0)
        ctx.save_for_backward(dx, dweight, dbias)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        dx, dweight, dbias = ctx.saved_tensors
        return (
            dx * scale.to(dx.dtype),
            (dweight * scale).to(ctx.weight_dtype),
            None if dbias is None else (dbias * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _chunks(x: Tensor) -> list[slice]:
    size = CHUNK.get(x.device.type, CHUNK["cpu"])
    return [slice(begin, begin + size) for begin in range(0, x.shape[0], size)]
