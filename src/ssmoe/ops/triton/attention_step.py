"""Attention of one new token a row on a GPU: the cache in pieces side by side, then their sums joined.

A row's pieces follow its length, which lies on the device, so that one CUDA graph serves every length and room
that is not in use costs nothing. Only positions before the new one are read from the cache; the new key and
value are added by the program that writes them, so no program waits for another's store.
"""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmoe.ops.reference.attention_step import frequencies
from ssmoe.ops.triton.launch import check_activations, check_shape, on_device

PROGRAMS = 2112
"""As many as keep the memory of an H100 or H200 busy, 16 a multiprocessor."""
BLOCK = 128
"""Cached tokens that a program reads at once."""
MOST = 128
"""Pieces of a row's past at most, since one program joins them."""
WIDEST = 256


def attention_step(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, *, rope_base: float | None
) -> Tensor:
    """`ssmoe.ops.reference.attention_step` for float32 and bfloat16, heads of at most 256 channels."""
    b, h, room, d = keys.shape
    check_activations(qkv=qkv, keys=keys, values=values)
    check_shape(qkv=(qkv, (b, 3 * h * d)), values=(values, (b, h, room, d)), length=(length, (b,)))
    if d > WIDEST:
        raise ValueError(f"heads of {d} channels: at most {WIDEST}, or build with backend='reference'")
    if not (keys.is_contiguous() and values.is_contiguous() and length.dtype == torch.int64):
        raise ValueError("keys and values must be contiguous and length int64: `init_state` makes them so")
    qkv = qkv.contiguous()
    pieces = max(1, min(triton.cdiv(PROGRAMS, b * h), triton.cdiv(room, BLOCK), MOST))
    sums = torch.empty(b * h, pieces, d, dtype=torch.float32, device=qkv.device)
    scales = torch.empty(2, b * h, pieces, dtype=torch.float32, device=qkv.device)
    y = torch.empty(b, h * d, dtype=qkv.dtype, device=qkv.device)
    turn = None if rope_base is None else _frequencies(d // 2, rope_base, qkv.device)
    wide = triton.next_power_of_2(d)
    with on_device(qkv):
        pieces_kernel[(b * h, pieces)](
            qkv, keys, values, length, qkv if turn is None else turn, sums, scales, room, d**-0.5,
            H=h, D=d, HALF=(d + 1) // 2, WIDE_HALF=triton.next_power_of_2((d + 1) // 2), WIDE=wide,
            PIECES=pieces, BLOCK=BLOCK, ROPE=rope_base is not None, num_warps=4,
        )  # fmt: skip
        join_kernel[(b * h,)](
            sums, scales, length, y, H=h, D=d, WIDE=wide, PIECES=pieces,
            WIDE_PIECES=triton.next_power_of_2(pieces), num_warps=4,
        )  # fmt: skip
    return y


@cache
def _frequencies(half: int, base: float, device: torch.device) -> Tensor:
    """Those of the definition, so that a position's angle has the same bits; made before a graph is captured."""
    return frequencies(half, base, torch.float32, device)


@triton.jit
def pieces_kernel(
    qkv_ptr, keys_ptr, values_ptr, length_ptr, turn_ptr, sums_ptr, scales_ptr, room, scale,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDE_HALF: tl.constexpr, WIDE: tl.constexpr,
    PIECES: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Of one head of one row (axis 0): the sum over one piece of its past (axis 1), its maximum and weight."""
    row_head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = row_head // H, row_head % H
    length = tl.load(length_ptr + row)
    i, channel = tl.arange(0, WIDE_HALF), tl.arange(0, WIDE)
    # the two halves of a head, which turn against each other; without rotation it may be odd
    first, second = i < HALF, HALF + i < D
    q_ptr = qkv_ptr + row * 3 * H * D + head * D
    q1 = tl.load(q_ptr + i, mask=first, other=0.0).to(tl.float32)
    q2 = tl.load(q_ptr + HALF + i, mask=second, other=0.0).to(tl.float32)
    if ROPE:
        angle = length.to(tl.float32) * tl.load(turn_ptr + i, mask=first, other=0.0)
        cos, sin = tl.cos(angle), tl.sin(angle)
        q1, q2 = q1 * cos - q2 * sin, q2 * cos + q1 * sin
    # as the definition rounds the query before the product
    q1 = q1.to(qkv_ptr.dtype.element_ty).to(tl.float32) * scale
    q2 = q2.to(qkv_ptr.dtype.element_ty).to(tl.float32) * scale

    size = tl.cdiv(tl.cdiv(length, PIECES), BLOCK) * BLOCK
    begin = piece * size
    end = tl.minimum(begin + size, length)
    cache = row_head * room * D
    top, weight = -float("inf"), 0.0
    total = tl.zeros((WIDE,), dtype=tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        present = token < end
        at = cache + token[:, None] * D
        k1 = tl.load(keys_ptr + at + i[None, :], mask=present[:, None] & first[None, :], other=0.0)
        k2 = tl.load(keys_ptr + at + HALF + i[None, :], mask=present[:, None] & second[None, :], other=0.0)
        v = tl.load(
            values_ptr + at + channel[None, :], mask=present[:, None] & (channel < D)[None, :], other=0.0
        )
        score = tl.sum(k1.to(tl.float32) * q1[None, :] + k2.to(tl.float32) * q2[None, :], axis=1)
        score = tl.where(present, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, axis=0))
        part = tl.exp(score - higher)
        kept = tl.exp(top - higher)
        weight = weight * kept + tl.sum(part, axis=0)
        total = total * kept + tl.sum(part[:, None] * v.to(tl.float32), axis=0)
        top = higher
    if piece == 0:
        k1 = tl.load(q_ptr + H * D + i, mask=first, other=0.0).to(tl.float32)
        k2 = tl.load(q_ptr + H * D + HALF + i, mask=second, other=0.0).to(tl.float32)
        v = tl.load(q_ptr + 2 * H * D + channel, mask=channel < D, other=0.0)
        if ROPE:
            k1, k2 = k1 * cos - k2 * sin, k2 * cos + k1 * sin
        k1, k2 = k1.to(keys_ptr.dtype.element_ty), k2.to(keys_ptr.dtype.element_ty)
        v = v.to(values_ptr.dtype.element_ty)
        at = cache + length * D
        # the host gives enough room; past it nothing is written
        inside = length < room
        tl.store(keys_ptr + at + i, k1, mask=first & inside)
        tl.store(keys_ptr + at + HALF + i, k2, mask=second & inside)
        tl.store(values_ptr + at + channel, v, mask=(channel < D) & inside)
        score = tl.sum(q1 * k1.to(tl.float32) + q2 * k2.to(tl.float32), axis=0)
        higher = tl.maximum(top, score)
        part, kept = tl.exp(score - higher), tl.exp(top - higher)
        weight = weight * kept + part
        total = total * kept + part * v.to(tl.float32)
        top = higher
    at = row_head * PIECES + piece
    tl.store(sums_ptr + at * D + channel, total, mask=channel < D)
    tl.store(scales_ptr + at, top)
    tl.store(scales_ptr + tl.num_programs(0) * PIECES + at, weight)


@triton.jit
def join_kernel(
    sums_ptr, scales_ptr, length_ptr, y_ptr,
    H: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, PIECES: tl.constexpr, WIDE_PIECES: tl.constexpr,
):  # fmt: skip
    """y of one head of one row, and by its first head the length counted on."""
    row_head = tl.program_id(0).to(tl.int64)
    piece, channel = tl.arange(0, WIDE_PIECES), tl.arange(0, WIDE)
    at = row_head * PIECES + piece
    top = tl.load(scales_ptr + at, mask=piece < PIECES, other=-float("inf"))
    weight = tl.load(scales_ptr + tl.num_programs(0) * PIECES + at, mask=piece < PIECES, other=0.0)
    factor = tl.exp(top - tl.max(top, axis=0))
    total = tl.sum(weight * factor, axis=0)
    sums = tl.load(
        sums_ptr + at[:, None] * D + channel[None, :],
        mask=(piece < PIECES)[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    y = tl.sum(sums * factor[:, None], axis=0) / total
    tl.store(y_ptr + row_head * D + channel, y.to(y_ptr.dtype.element_ty), mask=channel < D)
    if row_head % H == 0:
        place = length_ptr + row_head // H
        tl.store(place, tl.load(place) + 1)
