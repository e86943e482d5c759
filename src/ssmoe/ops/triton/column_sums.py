"""Sums over programs: every kernel that adds up a gradient writes a row a program, and one launch adds the rows."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.triton.launch import on_device

MOST = 3
"""Tensors that one launch adds up."""
ROWS, COLUMNS, WARPS = 1024, 8, 8


def column_sums(*parts: tuple[Tensor, torch.dtype]) -> list[Tensor]:
    """Of each contiguous float32 tensor (n, ...), at most MOST of them, its sum (...) over n, in the dtype beside it.

    In an order that does not change, so that two runs are bitwise equal. An empty tensor gives an empty sum.
    """
    sums = [
        torch.empty(part.shape[1:] if part.numel() else (0,), dtype=dtype, device=part.device)
        for part, dtype in parts
    ]
    pairs = [(part, total) for (part, _), total in zip(parts, sums, strict=True) if part.numel()]
    if not pairs:
        return sums
    sizes = [total.numel() for _, total in pairs]
    blocks = [triton.cdiv(size, COLUMNS) for size in sizes]
    rows = max(part.shape[0] for part, _ in pairs)
    empty = [pairs[0]] * (MOST - len(pairs))
    given = [
        value for pair in (*pairs, *empty) for value in (pair[0], pair[1], pair[0].shape[0], pair[1].numel())
    ]
    ends = [sum(blocks[: i + 1]) for i in range(MOST - 1)]
    with on_device(pairs[0][0]):
        column_sums_kernel[(sum(blocks),)](
            *given, *ends, ROWS=min(ROWS, triton.next_power_of_2(rows)), BLOCK=COLUMNS,
            num_warps=WARPS if rows > 64 else 4,
        )  # fmt: skip
    return sums


@triton.jit
def add_rows(part, total, rows, size, block, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = block * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        at = part + row.to(tl.int64)[:, None] * size + column[None, :]
        sums += tl.load(at, mask=(row < rows)[:, None] & (column < size)[None, :], other=0.0)
    tl.store(total + column, tl.sum(sums, axis=0).to(total.dtype.element_ty), mask=column < size)


@triton.jit
def column_sums_kernel(
    part, total, rows, size, part2, total2, rows2, size2, part3, total3, rows3, size3, end, end2,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """end, end2: the first program of the second and of the third tensor."""
    block = tl.program_id(0)
    if block < end:
        add_rows(part, total, rows, size, block, ROWS, BLOCK)
    elif block < end2:
        add_rows(part2, total2, rows2, size2, block - end, ROWS, BLOCK)
    else:
        add_rows(part3, total3, rows3, size3, block - end2, ROWS, BLOCK)
