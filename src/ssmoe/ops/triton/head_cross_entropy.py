"""The head's cross-entropy on a GPU: torch's products around our kernel of a row's logits.

A row of logits is as long as the next multiple of 64 from the vocabulary on: matrix products read rows that do not
start at multiples of 16 bytes several times slower. What lies beyond the vocabulary takes part in nothing.
"""

from typing import Any, cast

import torch
from torch import Tensor

from ssmoe.ops.reference.cross_entropy import IGNORE
from ssmoe.ops.reference.head_cross_entropy import CHUNK
from ssmoe.ops.triton import head_kernels
from ssmoe.ops.triton.cross_entropy import check, overwrite, sums_of
from ssmoe.ops.triton.scaled import scaled

ALIGNED = 64


def head_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """x (t, d), weight (vocab, d), bias (vocab,), targets (t,) -> (); see the reference."""
    check(x, targets)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    width = -(-weight.shape[0] // ALIGNED) * ALIGNED
    function = _Powers if differentiable and head_kernels.covers(x, width) else _HeadCrossEntropy
    total = cast(Tensor, function.apply(x, weight, bias, targets, differentiable))
    return total / (targets != IGNORE).sum().clamp(min=1)


class _HeadCrossEntropy(torch.autograd.Function):
    """The gradients are formed in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradient: bool
    ) -> Tensor:
        (t, d), vocab = x.shape, weight.shape[0]
        wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        width = -(-vocab // ALIGNED) * ALIGNED
        narrow, shift = _padded(weight, width, x.dtype), None
        if bias is not None:
            shift = _padded(bias, width, x.dtype)
        size = min(t, CHUNK.get(x.device.type, CHUNK["cpu"]))
        buffer = torch.empty(size, width, dtype=x.dtype, device=x.device)
        losses = torch.empty(t, **wide)
        dx = torch.empty_like(x) if gradient else None
        dweight = torch.zeros(width, d, **wide) if gradient else None
        sums = sums_of(buffer) if gradient and bias is not None else None
        for begin in range(0, t, max(size, 1)):
            rows = slice(begin, begin + size)
            part = x[rows]
            logits = buffer[: part.shape[0]]
            if shift is None:
                torch.mm(part, narrow.t(), out=logits)
            else:
                torch.addmm(shift, part, narrow.t(), out=logits)
            overwrite(logits, targets[rows], losses[rows], vocab, gradient=gradient, sums=sums)
            if dx is not None and dweight is not None:
                torch.mm(logits, narrow, out=dx[rows])
                _add_product(dweight, logits.t(), part)
        if gradient:
            dbias = None if sums is None else sums.sum(0)
            ctx.save_for_backward(dx, dweight, dbias)
            ctx.vocab, ctx.dtype = vocab, weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        dx, dweight, dbias = ctx.saved_tensors
        return (
            scaled(dx, scale, dx.dtype),
            scaled(dweight[: ctx.vocab], scale, ctx.dtype),
            None if dbias is None else (dbias[: ctx.vocab] * scale).to(ctx.dtype),
            None,
            None,
        )


class _Powers(torch.autograd.Function):
    """The same, without a pass over the logits: see `head_kernels`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, _: bool) -> Tensor:
        (t, d), vocab = x.shape, weight.shape[0]
        wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        width = -(-vocab // ALIGNED) * ALIGNED
        narrow, targets = _padded(weight, width, x.dtype).contiguous(), targets.contiguous()
        shift = head_kernels.shifts(bias, vocab, x.device)
        top = head_kernels.near_tops(x, narrow, shift, vocab)
        # the bias's gradient is that of columns beside x
        used = d if bias is None else d + head_kernels.EXTRA
        size = min(t, CHUNK.get(x.device.type, CHUNK["cpu"]))
        buffer = torch.empty(size, width, dtype=x.dtype, device=x.device)
        scaled_x = torch.empty(size, d + head_kernels.EXTRA, dtype=x.dtype, device=x.device)
        losses, inverse = torch.empty(t, **wide), torch.empty(t, **wide)
        dx, dweight = torch.empty_like(x), torch.empty(width, used, **wide)
        for begin in range(0, t, max(size, 1)):
            rows = slice(begin, begin + size)
            part = x[rows]
            e, beside = buffer[: part.shape[0]], scaled_x[: part.shape[0]]
            sums = head_kernels.powers(part, narrow, shift, top[rows], e)
            head_kernels.finish(
                part, narrow, shift, top[rows], sums, targets[rows], e, vocab,
                losses[rows], inverse[rows], beside,
            )  # fmt: skip
            torch.mm(e, narrow, out=dx[rows])
            if begin:
                _add_product(dweight, e.t(), beside[:, :used])
            else:
                _product(dweight, e.t(), beside[:, :used])
        ctx.save_for_backward(dx, dweight, inverse)
        ctx.vocab, ctx.dtype, ctx.bias = vocab, weight.dtype, bias is not None
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        dx, dweight, inverse = ctx.saved_tensors
        d, whole = dx.shape[1], dweight[: ctx.vocab]
        dbias = (whole[:, d:].sum(1) * scale).to(ctx.dtype) if ctx.bias else None
        return (
            scaled(dx, scale, dx.dtype, inverse),
            scaled(whole[:, :d], scale, ctx.dtype),
            dbias,
            None,
            None,
        )


def _padded(tensor: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """In `dtype`, with rows of zeros up to `width`."""
    if tensor.shape[0] == width:
        return tensor.to(dtype)
    padded = torch.zeros(width, *tensor.shape[1:], dtype=dtype, device=tensor.device)
    padded[: tensor.shape[0]] = tensor
    return padded


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, in the float32 of `out`."""
    if out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the float32 of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
