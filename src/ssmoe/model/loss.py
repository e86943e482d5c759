"""Cross-entropy of the head without keeping logits, and its sum with the routers' losses."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ssmoe.model.layer import RouterStats
from ssmoe.ops import Ops, load
from ssmoe.ops.reference.cross_entropy import IGNORE

_CHUNK = {"cpu": 2048, "cuda": 8192}
"""Rows of logits that live at one time, by kind of device; elsewhere as on a CPU."""


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
    ops: Ops | None = None,
) -> Loss:
    """The loss of x (b, l, d), the head's input, under weight (vocab, d) and bias (vocab,).

    targets: (b, l) int64, `IGNORE` where nothing is predicted. ops: the kernels, by default the definitions.
    """
    flat = targets.reshape(-1)
    tokens = (flat != IGNORE).sum()
    total = head_cross_entropy(x.reshape(flat.shape[0], -1), weight, bias, flat, ops)
    lm = total / tokens.clamp(min=1)
    zero = torch.zeros_like(lm)
    balance = torch.stack([zero, *(s.balance for s in stats)]).sum()
    z = torch.stack([zero, *(s.z for s in stats)]).sum()
    return Loss(lm + balance + z, lm, balance, z, tokens)


def head_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ops: Ops | None = None
) -> Tensor:
    """Summed cross-entropy of softmax(x W^T + b), () in float32 or wider, differentiable once.

    x: (t, d). weight: (vocab, d). bias: (vocab,). targets: (t,) int64, `IGNORE` where nothing is predicted.
    A chunk of logits lives only while it is used, so memory does not grow with tokens * vocabulary.
    """
    ops = ops or load("reference")
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return cast(Tensor, _HeadCrossEntropy.apply(x, weight, bias, targets, ops))
    narrow = weight.to(x.dtype)
    losses = [
        ops.cross_entropy(ops.linear(x[rows], narrow, bias), targets[rows], gradient=False)[0].sum()
        for rows in _chunks(x)
    ]
    return torch.stack(losses).sum()


class _HeadCrossEntropy(torch.autograd.Function):
    """The gradients are formed in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ops: Ops
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        narrow = weight.to(x.dtype)
        for rows in _chunks(x):
            loss, dlogits = ops.cross_entropy(ops.linear(x[rows], narrow, bias), targets[rows], gradient=True)
            assert dlogits is not None
            total += loss.sum()
            dx[rows] = ops.linear(dlogits, narrow.t())
            dweight += ops.linear(dlogits.t(), x[rows].t())
            if dbias is not None:
                dbias += (dlogits.new_ones(1, dlogits.shape[0]) @ dlogits).squeeze(0)
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


def _chunks(x: Tensor) -> list[slice]:
    size = _CHUNK.get(x.device.type, _CHUNK["cpu"])
    return [slice(begin, begin + size) for begin in range(0, x.shape[0], size)]
