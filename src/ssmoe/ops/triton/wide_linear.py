"""A router's product on a GPU's matrix units, without losing float32.

A float32 weight is the sum of three bfloat16 numbers, but for its last bit, and the product of two bfloat16
numbers is exact in float32. So for a bfloat16 input three products with float32 sums are the float32 product, at
several times its speed. So is the gradient of the weight, of the parts of the incoming gradient; that of the input
is rounded to bfloat16 in the end and takes the first part of both, as every projection does.
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.reference.wide_linear import wide_linear as torch_wide_linear
from ssmoe.ops.triton.launch import cdiv, direct, on_device, power_of_two, product
from ssmoe.ops.triton.split_linear import NARROW, add_product

PARTS = 3


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., d_in), weight (d_out, d_in) float32 -> (..., d_out) float32; see the reference."""
    if x.dtype != torch.bfloat16 or weight.dtype != torch.float32 or x.numel() == 0:
        return torch_wide_linear(x, weight)
    return direct(wide_forward, x)(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def fork_wide(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(x, `wide_linear` of it); see the reference."""
    differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    narrow = x.dtype == torch.bfloat16 and weight.dtype == torch.float32 and weight.shape[0] <= NARROW
    if not (differentiable and narrow) or x.numel() == 0:
        return x, wide_linear(x, weight)
    return _ForkWide.apply(x, weight)


class _ForkWide(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        y = direct(wide_forward, x)(x.reshape(-1, x.shape[-1]), weight)
        return x.view_as(x), y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dstream, dy):
        x, weight = ctx.saved_tensors
        n, d = weight.shape
        rows = x.reshape(-1, d)
        parts = wide_parts(dy.reshape(-1, n))
        dx = add_product(dstream.reshape(-1, d), parts[:, :n], weight.to(torch.bfloat16))
        return dx.view_as(x), _weight_gradient(parts, rows, n)


@torch.library.custom_op("ssmoe::wide_forward", mutates_args=())
def wide_forward(x: Tensor, weight: Tensor) -> Tensor:
    """(t, d_in), (d_out, d_in) -> (t, d_out) float32."""
    (t, k), n = x.shape, weight.shape[0]
    x = x.contiguous()
    y = torch.empty(t, n, dtype=torch.float32, device=x.device)
    tile = min(128, max(16, power_of_two(n)))
    rows = 128 if t > 64 else 16
    with on_device(x):
        wide_kernel[(cdiv(t, rows) * cdiv(n, tile),)](
            x, split(weight, PARTS), y, t, n, k, PARTS=PARTS, BM=rows, BN=tile, BK=64, EVEN_K=k % 64 == 0,
            CAST=tl.bfloat16 if x.is_cuda else tl.float32,
            num_warps=8 if rows == 128 and tile == 128 else 4, num_stages=3,
        )  # fmt: skip
    return y


@wide_forward.register_fake
def _(x, weight):
    return torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)


@torch.library.custom_op("ssmoe::wide_backward", mutates_args=())
def wide_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    n = weight.shape[0]
    parts = wide_parts(dy)
    return parts[:, :n] @ weight.to(torch.bfloat16), _weight_gradient(parts, x, n)


def _weight_gradient(parts: Tensor, x: Tensor, n: int) -> Tensor:
    return product(parts.t(), x, torch.float32).view(PARTS, n, -1).sum(0)


@torch.library.custom_op("ssmoe::wide_parts", mutates_args=())
def wide_parts(dy: Tensor) -> Tensor:
    """dy (t, d_out) in three bfloat16 parts side by side, (t, 3 * d_out), so that one product reads x once."""
    return split(dy, PARTS, beside=dy.shape[1])


@wide_parts.register_fake
def _(dy):
    return torch.empty(dy.shape[0], PARTS * dy.shape[1], dtype=torch.bfloat16, device=dy.device)


@wide_backward.register_fake
def _(dy, x, weight):  # noqa: ARG001
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _save(ctx, inputs, output):  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return wide_backward(dy, *ctx.saved_tensors)


wide_forward.register_autograd(_backward, setup_context=_save)


def split(x: Tensor, parts: int, beside: int = 0) -> Tensor:
    """(...) float32 -> (parts, ...) bfloat16 that add up to it, the largest first.

    beside: of x (t, beside), the parts of a row side by side instead, (t, parts * beside).
    """
    x = x.contiguous()
    shape = (x.shape[0], parts * beside) if beside else (parts, *x.shape)
    out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    with on_device(x):
        split_kernel[(cdiv(x.numel(), 1024),)](
            x, out, x.numel(), beside or x.numel(), PARTS=parts, BLOCK=1024, num_warps=4
        )
    return out


@triton.jit
def split_kernel(x, out, count, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """width: values that lie side by side before their next parts do."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x + at, mask=at < count, other=0.0)
    to = out + (at // width) * (PARTS * width) + at % width
    for i in tl.static_range(PARTS):
        part = rest.to(tl.bfloat16)
        tl.store(to, part, mask=at < count)
        to += width
        rest -= part.to(tl.float32)


@triton.jit
def wide_kernel(
    x, weight, y, T, N, K, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_K: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """y = x (weight[0] + weight[1] + ...)^T, a tile of rows and of columns. CAST: what the interpreter multiplies."""
    groups = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    row = (pid // groups).to(tl.int64) * BM + tl.arange(0, BM)
    n = (pid % groups) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, K, BK):
        inside = (begin + k < K) if EVEN_K is False else (k >= 0)
        a = tl.load(
            x + row[:, None] * K + begin + k[None, :], mask=(row < T)[:, None] & inside[None, :], other=0.0
        )
        for i in tl.static_range(PARTS):
            # the smallest part first
            at = weight + ((PARTS - 1 - i) * N + n)[None, :].to(tl.int64) * K + begin + k[:, None]
            part = tl.load(at, mask=(n < N)[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(a.to(CAST), part.to(CAST), acc, input_precision="ieee")
    tl.store(y + row[:, None] * N + n[None, :], acc, mask=(row < T)[:, None] & (n < N)[None, :])
