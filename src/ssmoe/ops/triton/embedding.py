"""A table's gradient on a GPU, added up in an order that does not change and without atomics.

Positions are sorted by id, equal ids by place. One program adds up a row of the table, so that absent ids need no
zeros written before; where an id fills whole blocks of positions, each block has been added up by another program.
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.reference.embedding import embedding as torch_embedding
from ssmoe.ops.triton.launch import on_device

SPAN = 64
"""Positions of a block."""
WIDEST = 16384


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """`ssmoe.ops.reference.embedding`; sums of its gradient in float32, up to 16,384 channels."""
    narrow = weight.dtype in (torch.float32, torch.bfloat16) and weight.shape[1] <= WIDEST
    if not (torch.is_grad_enabled() and weight.requires_grad and narrow and ids.numel()):
        return torch_embedding(ids, weight)
    return _Embedding.apply(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.vocab, ctx.dtype = weight.shape[0], weight.dtype
        return torch_embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        return None, table_gradient(dy.reshape(-1, dy.shape[-1]), ctx.saved_tensors[0], ctx.vocab, ctx.dtype)


@torch.library.custom_op("ssmoe::table_gradient", mutates_args=())
def table_gradient(dy: Tensor, ids: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """(vocab, d): the sums of the rows of dy (t, d) that have the same id."""
    dy, (t, d) = dy.contiguous(), dy.shape
    found, order = torch.sort(ids.reshape(-1).to(torch.int32), stable=True)
    every = torch.arange(vocab + 1, dtype=torch.int32, device=dy.device)
    begins = torch.searchsorted(found, every, out_int32=True)
    blocks, block = triton.cdiv(t, SPAN), triton.next_power_of_2(d)
    sums = torch.empty(blocks, d, dtype=torch.float32, device=dy.device)
    out = torch.empty(vocab, d, dtype=dtype, device=dy.device)
    options = {"SPAN": SPAN, "BLOCK": block, "num_warps": max(1, min(8, block // 512))}
    with on_device(dy):
        whole_blocks_kernel[(blocks,)](dy, found, order, sums, t, d, **options)
        table_kernel[(vocab,)](dy, order, begins, sums, out, d, **options)
    return out


@table_gradient.register_fake
def _(dy, ids, vocab, dtype):  # noqa: ARG001
    return torch.empty(vocab, dy.shape[1], dtype=dtype, device=dy.device)


@triton.jit
def add_positions(total, dy, order, begin, end, d, lane):
    """total plus the rows of the sorted positions begin to end."""
    for i in range(begin, end):
        at = dy + tl.load(order + i) * d + lane
        total += tl.load(at, mask=lane < d, other=0.0).to(tl.float32)
    return total


@triton.jit
def whole_blocks_kernel(dy, found, order, sums, t, d, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the blocks that hold one id only; those of others are never read."""
    begin = tl.program_id(0) * SPAN
    end = tl.minimum(begin + SPAN, t) - 1
    if tl.load(found + begin) == tl.load(found + end):
        lane = tl.arange(0, BLOCK)
        total = add_positions(tl.zeros((BLOCK,), tl.float32), dy, order, begin, end + 1, d, lane)
        tl.store(sums + tl.program_id(0).to(tl.int64) * d + lane, total, mask=lane < d)


@triton.jit
def table_kernel(dy, order, begins, sums, out, d, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    begin, end = tl.load(begins + row), tl.load(begins + row + 1)
    first = tl.minimum(tl.cdiv(begin, SPAN) * SPAN, end)
    last = tl.maximum(end // SPAN * SPAN, first)
    total = add_positions(tl.zeros((BLOCK,), tl.float32), dy, order, begin, first, d, lane)
    at = sums + (first // SPAN).to(tl.int64) * d + lane
    for _ in range(first, last, SPAN):
        total += tl.load(at, mask=lane < d, other=0.0)
        at += d
    total = add_positions(total, dy, order, last, end, d, lane)
    tl.store(out + row.to(tl.int64) * d + lane, total.to(out.dtype.element_ty), mask=lane < d)
