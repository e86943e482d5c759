"""Attention against the formula, its growing state, and rotary positions."""

import pytest
import torch

from ssmoe.model.mixers.attention import Attention, copy_with_room
from ssmoe.ops import load


def test_equals_softmax_of_scores() -> None:
    torch.manual_seed(0)
    block = Attention(8, num_heads=2, rope=False).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = block.qkv_proj(x).view(6, 3, 2, 4).permute(1, 2, 0, 3)
    scores = (q @ k.transpose(1, 2)) / 2
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(1, 6, 8)
    torch.testing.assert_close(block(x).x, block.o_proj(y))


def test_rotary_scores_depend_on_distance_only() -> None:
    """Equal tokens at every position: with RoPE the first query sees itself, so outputs stay equal."""
    torch.manual_seed(0)
    block = Attention(8, num_heads=2).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    moved = block(x, block.init_state(1, 0, torch.float64, torch.device("cpu")))
    shifted_state = moved.state._replace(
        keys=moved.state.keys[:, :, :0], values=moved.state.values[:, :, :0], length=torch.tensor([5])
    )
    # a past of five forgotten tokens shifts every position by five
    shifted = block(x, shifted_state._replace(keys=torch.zeros(1, 2, 0, 4).double()))
    assert shifted.x.shape == moved.x.shape
    torch.testing.assert_close(shifted.x, moved.x, rtol=0, atol=1e-12)


def test_room_is_used_before_it_grows() -> None:
    block = Attention(8, num_heads=2)
    state = block.init_state(1, 4, torch.float32, torch.device("cpu"))
    state = block(torch.randn(1, 3, 8), state).state
    assert (state.keys.shape[2], int(state.length)) == (4, 3)
    state = block(torch.randn(1, 3, 8), state).state
    assert (state.keys.shape[2], int(state.length)) == (6, 6)


def test_a_state_can_be_continued_twice() -> None:
    torch.manual_seed(0)
    block = Attention(8, num_heads=2).double()
    first, x, other = (torch.randn(1, n, 8, dtype=torch.float64) for n in (4, 3, 3))
    state = block(first, block.init_state(1, 16, torch.float64, torch.device("cpu"))).state
    expected = block(x, state).x
    block(other, state)
    assert torch.equal(block(x, state).x, expected)


@torch.no_grad()
def test_one_token_leaves_the_state_as_it_was_with_room_or_without() -> None:
    torch.manual_seed(0)
    block = Attention(8, num_heads=2).double()
    whole = torch.randn(2, 7, 8, dtype=torch.float64)
    for capacity in (0, 16):
        state = block(whole[:, :4], block.init_state(2, capacity, torch.float64, torch.device("cpu"))).state
        before = [leaf.clone() for leaf in state]
        for _ in range(2):
            torch.testing.assert_close(block(whole[:, 4:5], state).x, block(whole[:, :5]).x[:, 4:])
            assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


@torch.no_grad()
def test_pieces_are_the_whole_whether_the_cache_is_full_or_not() -> None:
    torch.manual_seed(0)
    block = Attention(8, num_heads=2).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    for capacity in (0, 20):
        state = block.init_state(2, capacity, torch.float64, torch.device("cpu"))
        pieces = []
        for piece in x.split([3, 5, 1], dim=1):
            out = block(piece, state)
            state, pieces = out.state, [*pieces, out.x]
        torch.testing.assert_close(torch.cat(pieces, 1), block(x).x)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("room", [3, 9])
@torch.no_grad()
def test_heads_of_two_channels_are_continued(backend: str, room: int) -> None:
    """Their rotated keys look to torch like pictures with the channels last, which a pad and a clone keep."""
    layer = Attention(8, num_heads=4, ops=load(backend))
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    _, state, _ = layer(x[:, :3])
    state = copy_with_room(state, room)
    assert state.keys.is_contiguous()
    assert state.values.is_contiguous()
    whole, _, _ = layer(x)
    torch.testing.assert_close(layer(x[:, 3:], state).x, whole[:, 3:], rtol=1e-5, atol=1e-6)
