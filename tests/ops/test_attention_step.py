"""The definition of one token's attention against the formula, in place and whatever the free room holds."""

import pytest
import torch

from ssmoe.ops.reference import attention_step
from ssmoe.ops.reference.attention_step import rotate


@pytest.mark.parametrize("rope_base", [None, 100.0])
def test_equals_softmax_of_scores_and_writes_the_token(rope_base: float | None) -> None:
    torch.manual_seed(0)
    b, h, room, d = 2, 3, 9, 4
    keys, values = (torch.randn(b, h, room, d, dtype=torch.float64) for _ in range(2))
    length, before = torch.tensor([6, 2]), (keys.clone(), values.clone())
    # what is free may hold anything
    keys[1, :, 3:], values[1, :, 2:] = torch.nan, torch.nan
    qkv = torch.randn(b, 3 * h * d, dtype=torch.float64)
    y = attention_step(qkv, keys, values, length, rope_base=rope_base)
    assert length.tolist() == [7, 3]
    for row, used in enumerate((6, 2)):
        q, k, v = qkv[row].view(3, 1, h, 1, d)
        if rope_base is not None:
            q, k = (rotate(t, torch.tensor([[used]]), rope_base) for t in (q, k))
        k, v = (torch.cat((past[row, :, :used], new[0]), 1) for past, new in zip(before, (k, v), strict=True))
        expected = (q[0] @ k.transpose(1, 2) / d**0.5).softmax(-1) @ v
        torch.testing.assert_close(y[row], expected.flatten())
        torch.testing.assert_close(keys[row, :, : used + 1], k)
        torch.testing.assert_close(values[row, :, : used + 1], v)


def test_room_that_is_used_up_is_an_error() -> None:
    cache = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="holds 4 tokens and 4 are in use"):
        attention_step(torch.zeros(1, 6), cache, cache.clone(), torch.tensor([4]), rope_base=None)
