"""Attention of one new token a row to a key-value cache that is written in place, and rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_step(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, *, rope_base: float | None
) -> Tensor:
    """softmax(q K^T / sqrt(d_head)) V over the tokens so far and the new one; inference only.

    qkv: (b, 3 * h * d_head), query, key and value of the new token, each head after head. keys, values:
    (b, h, c, d_head), `length` (b,) int64 of them in use: the new key, rotated, and value are written after
    those and `length` is counted on, all in place. What lies past a row's length is never read, so it may be
    anything. rope_base: None is without rotary positions. Returns (b, h * d_head).
    Raises ValueError where a row's room is used up (a GPU kernel does not see it: give enough).
    """
    q = append(qkv, keys, values, length, rope_base=rope_base)
    most = int(length.max())
    k, v = keys[:, :, :most], values[:, :, :most]
    seen = torch.arange(most, device=keys.device) < length.unsqueeze(1)  # (b, most)
    if bool(seen.all()):
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        free, seen = ~seen[:, None, :, None], seen[:, None, None]
        k, v = k.masked_fill(free, 0), v.masked_fill(free, 0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return y.flatten(1)


def append(qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, *, rope_base: float | None) -> Tensor:
    """Write the new tokens' keys and values, count `length` on and return the queries (b, h, 1, d_head)."""
    b, h, room, d = keys.shape
    if (most := int(length.max())) >= room:
        raise ValueError(f"the cache holds {room} tokens and {most} are in use: give it more room")
    q, k, v = qkv.view(b, 1, 3, h, d).permute(2, 0, 3, 1, 4)
    if rope_base is not None:
        positions = length.unsqueeze(1)
        q, k = rotate(q, positions, rope_base), rotate(k, positions, rope_base)
    # not by scatter_, which on a CPU takes the time of a copy of the whole cache
    row, head = (torch.arange(n, device=keys.device) for n in (b, h))
    place = row.unsqueeze(1), head, length.unsqueeze(1)
    keys[place] = k.squeeze(2).to(keys.dtype)
    values[place] = v.squeeze(2).to(values.dtype)
    length.add_(1)
    return q


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Turn the pair (i, i + d_head / 2) of x (b, h, l, d_head) by position * base^(-2i / d_head)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = frequencies(x.shape[-1] // 2, base, dtype, x.device)
    angle = (positions.to(dtype).unsqueeze(-1) * frequency).unsqueeze(1)  # (b, 1, l, d_head / 2)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def frequencies(half: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """base^(-i / half), by how much pair i of a head turns from one position to the next."""
    return base ** (-torch.arange(half, dtype=dtype, device=device) / half)
