"""The head's cross-entropy on the CPU: `ssmoe.ops.reference.head_cross_entropy`, by `csrc/dense.cpp`.

Logits, probabilities and their gradient are one recycled buffer, and the head's gradient is written in
float32. Below AVX-512, where our products are not the machine's fastest, it is composed of the finer ops.
"""

from typing import Any, cast

import torch
from torch import Tensor

from ssmoe.ops.cpu.linear import OWN, linear
from ssmoe.ops.cpu.state import any_gradient
from ssmoe.ops.reference.cross_entropy import cross_entropy
from ssmoe.ops.reference.head_cross_entropy import composed


def head_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """x (t, d), weight (vocab, d), bias (vocab,), targets (t,) -> (); see the reference."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not OWN or weight.dtype not in (x.dtype, wide) or not any_gradient(x, weight, bias):
        return composed(linear, cross_entropy, x, weight, bias, targets)
    return cast(Tensor, _HeadCrossEntropy.apply(x, weight, None if bias is None else bias.to(wide), targets))


class _HeadCrossEntropy(torch.autograd.Function):
    """The gradients are formed in the forward pass, while the logits are at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        loss, dx, dweight, dbias = torch.ops.ssmoe.head_cross_entropy(x, weight, bias, targets)
        ctx.save_for_backward(dx, dweight, dbias)
        ctx.weight_dtype, ctx.with_bias = weight.dtype, bias is not None
        return loss.squeeze(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        dx, dweight, dbias = (_scaled(t, grad_outputs[0]) for t in ctx.saved_tensors)
        return dx, dweight.to(ctx.weight_dtype), dbias if ctx.with_bias else None, None


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """Untouched for a scale of 1, since a pass over the head's gradient costs as much as a layer."""
    if not torch.compiler.is_compiling() and float(scale) == 1:
        return gradient
    return gradient * scale.to(gradient.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(1, dtype=wide), x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=wide),
        x.new_empty(0 if bias is None else weight.shape[0], dtype=wide),
    )  # fmt: skip


torch.library.register_fake("ssmoe::head_cross_entropy", _fake)
