"""Projections of several readers on a GPU: torch's products, and no pass of its own to join or add gradients."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.reference.split_linear import fork_linear as torch_fork_linear
from ssmoe.ops.reference.split_linear import split_linear as torch_split_linear
from ssmoe.ops.triton.launch import on_device, product, row_major

NARROW = 128
"""Widths of a forked product up to this leave its gradient's cost to memory, where one kernel adds as well."""


def split_linear(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """x (..., d_in), weight (sum(sizes), d_in) -> pieces (..., size), each dense; see the reference."""
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return torch_split_linear(x, weight, sizes)
    return _SplitLinear.apply(x, weight, tuple(sizes))


def fork_linear(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., d_in), weight (d_out, d_in) -> (x, (..., d_out)); see the reference."""
    if weight.shape[0] > NARROW or x.dtype != torch.bfloat16:
        return torch_fork_linear(x, weight)
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return torch_fork_linear(x, weight)
    return _ForkLinear.apply(x, weight)


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, sizes):
        rows = x.reshape(-1, x.shape[-1])
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, narrow)
        ctx.sizes, ctx.dtype = sizes, weight.dtype
        return tuple((rows @ part.t()).view(*x.shape[:-1], -1) for part in narrow.split(list(sizes)))

    @staticmethod
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        pieces = [g.reshape(-1, g.shape[-1]) for g in gradients]
        parts = weight.split(list(ctx.sizes))
        dx = pieces[0] @ parts[0]
        for piece, part in zip(pieces[1:], parts[1:], strict=True):
            dx.addmm_(piece, part)
        return dx.view_as(x), _joined([piece.t() for piece in pieces], rows, ctx.dtype), None


def _joined(pieces, rows, dtype):
    """The products of (size, t) pieces with rows (t, d_in), one below the other."""
    if not (rows.is_cuda and rows.dtype == torch.bfloat16 and dtype == torch.float32):
        return torch.cat([product(piece, rows, dtype) for piece in pieces])
    out = torch.empty(sum(piece.shape[0] for piece in pieces), rows.shape[1], dtype=dtype, device=rows.device)
    for piece, part in zip(pieces, out.split([piece.shape[0] for piece in pieces]), strict=True):
        torch.mm(piece, rows, out_dtype=dtype, out=part)
    return out


class _ForkLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, narrow)
        ctx.dtype = weight.dtype
        return x.view_as(x), torch.nn.functional.linear(x, narrow)

    @staticmethod
    def backward(ctx, dstream, dy):
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = add_product(dstream.reshape(-1, x.shape[-1]), rows, weight).view_as(x)
        return dx, product(rows.t(), x.reshape(-1, x.shape[-1]), ctx.dtype)


@torch.library.custom_op("ssmoe::add_product", mutates_args=())
def add_product(stream: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """stream + a @ b in one pass. stream: (t, n), a: (t, k), k at most NARROW, b: (k, n)."""
    (t, n), k = stream.shape, a.shape[1]
    stream, a, b = stream.contiguous(), row_major(a), b.contiguous()
    out = torch.empty_like(stream)
    grid = (triton.cdiv(t, 128) * triton.cdiv(n, 64),)
    with on_device(stream):
        add_product_kernel[grid](
            stream, a, b, out, t, n, k, a.stride(0), BM=128, BN=64, BK=max(16, triton.next_power_of_2(k)),
            CAST=tl.bfloat16 if stream.is_cuda else tl.float32, num_warps=4,
        )  # fmt: skip
    return out


@add_product.register_fake
def _(stream, a, b):  # noqa: ARG001
    return torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)


@triton.jit
def add_product_kernel(
    stream, a, b, out, T, N, K, stride_a, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CAST: tl.constexpr
):  # fmt: skip
    """CAST: what the interpreter multiplies."""
    groups = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    row = (pid // groups).to(tl.int64) * BM + tl.arange(0, BM)
    n = (pid % groups) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left = tl.load(
        a + row[:, None] * stride_a + k[None, :], mask=(row < T)[:, None] & (k < K)[None, :], other=0.0
    )
    right = tl.load(b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
    inside = (row < T)[:, None] & (n < N)[None, :]
    at = row[:, None] * N + n[None, :]
    total = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.dot(left.to(CAST), right.to(CAST), input_precision="ieee")
    tl.store(out + at, total, mask=inside)
