"""The largest of many numbers a row in one launch: a greedy choice, for which torch takes one block a row."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.triton.launch import check_activations, counters, on_device, row_major
from ssmoe.ops.triton.step_kernels import is_last

BLOCK = 2048


def argmax(x: Tensor) -> Tensor:
    """`ssmoe.ops.reference.argmax` for float32 and bfloat16 and less than 2^31 columns, else ValueError."""
    check_activations(x=x)
    b, n = x.shape
    if not 0 < n < 2**31:
        raise ValueError(f"x has {n} columns: from 1 to 2^31 - 1")
    x = row_major(x)
    found = torch.empty(b, dtype=torch.int64, device=x.device)
    if b == 0:
        return found
    parts = triton.cdiv(n, BLOCK)
    keys = torch.empty(b, parts, dtype=torch.int64, device=x.device)
    with on_device(x):
        argmax_kernel[(b * parts,)](
            x, keys, found, counters(x, b), n, parts, x.stride(0),
            BLOCK=BLOCK, PARTS=triton.next_power_of_2(parts), num_warps=4,
        )  # fmt: skip
    return found


@triton.jit
def argmax_kernel(x, keys, found, counter, n, parts, stride, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """A key orders numbers as its upper half and, of equal numbers, the first as largest. Grid (rows * parts,)."""
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + column, mask=column < n, other=-float("inf")).to(tl.float32)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    bits = tl.where(value == value, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    tl.store(keys + row * parts + part, tl.max(key, axis=0))
    if is_last(counter + row, parts):
        other = tl.arange(0, PARTS)
        largest = tl.load(
            keys + row * parts + other,
            mask=other < parts,
            other=-0x7FFFFFFFFFFFFFFF,
            cache_modifier=".cg",
        )
        tl.store(found + row, 0x7FFFFFFF - (tl.max(largest, axis=0) & 0x7FFFFFFF))
