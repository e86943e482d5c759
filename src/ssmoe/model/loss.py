"""Cross-entropy of the head without keeping logits, and its sum with the routers' losses."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.model.layer import RouterStats
from ssmoe.ops.reference import linear

Product = Callable[..., Tensor]
"""A backend's `linear`."""

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
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Sequence[RouterStats],
    product: Product = linear,
) -> Loss:
    """The loss of x (b, l, d), the head's input, under weight (vocab, d) and bias (vocab,).

    targets: (b, l) int64, `IGNORE` where nothing is predicted. product: the backend's `linear`.
    """
    flat = targets.reshape(-1)
    tokens = (flat != IGNORE).sum()
    total = head_cross_entropy(x.reshape(flat.shape[0], -1), weight, bias, flat, product)
    lm = total / tokens.clamp(min=1)
    zero = torch.zeros_like(lm)
    balance = torch.stack([zero, *(s.balance for s in stats)]).sum()
    z = torch.stack([zero, *(s.z for s in stats)]).sum()
    return Loss(lm + balance + z, lm, balance, z, tokens)


def head_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, product: Product = linear
) -> Tensor:
    """Summed cross-entropy of softmax(x W^T + b), () in float32 or wider, differentiable once.

    x: (t, d). weight: (vocab, d). bias: (vocab,). targets: (t,) int64, `IGNORE` where nothing is predicted.
    A chunk of logits lives only while it is used, so memory does not grow with tokens * vocabulary.
    """
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return cast(Tensor, _HeadCrossEntropy.apply(x, weight, bias, targets, product))
    narrow = weight.to(x.dtype)
    losses = [
        _summed(_log_probabilities(x[rows], narrow, bias, product), targets[rows])
        for rows in _chunks(x.shape[0])
    ]
    return torch.stack(losses).sum()


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
    return [slice(begin, begin + _CHUNK) for begin in range(0, tokens, _CHUNK)]


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
