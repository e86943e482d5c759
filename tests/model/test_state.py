"""States as values: select, expand, concatenate."""

import pytest
import torch

from ssmoe.model import state as states
from ssmoe.model.build import build
from ssmoe.model.mixers.attention import AttentionState
from ssmoe.model.mixers.mamba import MambaState
from tests.model.zoo import small

MODEL = build(small("hybrid")).double().eval()
IDS = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(0))
NEXT = torch.randint(61, (3, 4), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_selected_rows_continue_like_the_originals() -> None:
    state = MODEL(IDS).state
    expected = MODEL(NEXT, state).logits
    for index in ([2, 0], torch.tensor([1]), torch.tensor([True, False, True])):
        picked = MODEL(NEXT[index], states.select(state, index)).logits
        torch.testing.assert_close(picked, expected[index], rtol=0, atol=1e-12)


@torch.no_grad()
def test_expanded_rows_are_copies() -> None:
    state = states.expand(MODEL(IDS).state, 2)
    logits = MODEL(NEXT.repeat_interleave(2, 0), state).logits
    torch.testing.assert_close(logits[::2], MODEL(NEXT, MODEL(IDS).state).logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[1::2], logits[::2], rtol=0, atol=1e-12)


@torch.no_grad()
def test_concatenated_rows_of_different_lengths_continue() -> None:
    long, short = MODEL(IDS[:1]).state, MODEL(IDS[1:, :2]).state
    for rows, cut in (([long, short], 1), ([short, long], 2)):
        together = MODEL(NEXT, states.concatenate(rows)).logits
        apart = torch.cat([MODEL(NEXT[:cut], rows[0]).logits, MODEL(NEXT[cut:], rows[1]).logits])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


def test_kinds_are_kept_and_nothing_is_shared() -> None:
    state = MODEL.init_state(2, capacity=5)
    copy = states.select(state, [0, 1])
    assert [type(layer) for layer in copy][:4] == [MambaState, tuple, AttentionState, tuple]
    copy[0].ssm.add_(1)
    assert not state[0].ssm.any()
    assert states.num_bytes(state) == sum(
        leaf.numel() * leaf.element_size() for layer in state for leaf in layer
    )


def test_a_clone_is_equal_and_has_memory_of_its_own() -> None:
    state = MODEL.init_state(2, capacity=4)
    copy = states.clone(state)
    for ours, theirs in zip(copy, state, strict=True):
        assert type(ours) is type(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
            a.fill_(7)
            assert not (b == 7).any()


def test_detach_cuts_the_graph() -> None:
    state = MODEL(IDS).state
    assert state[0].ssm.requires_grad
    assert not states.detach(state)[0].ssm.requires_grad


def test_refusals() -> None:
    state = MODEL.init_state(1)
    with pytest.raises(ValueError, match="n >= 1, got 0"):
        states.expand(state, 0)
    with pytest.raises(ValueError, match="at least one state"):
        states.concatenate([])
    with pytest.raises(ValueError, match="different models"):
        states.concatenate([state, state[:2]])
    with pytest.raises(ValueError, match="kinds differ"):
        states.concatenate([state, state[::-1]])


@pytest.mark.parametrize("name", ["mamba", "moe-top2", "moe-mamba", "attention"])
def test_gradcheck_through_initial_and_final_state(name) -> None:
    """Logits and final state with respect to every floating leaf of the initial state."""
    model = build(small(name, repeat=1)).double().eval()
    start = [leaf for layer in model(IDS[:2, :4]).state for leaf in layer]
    leaves = [leaf.detach().requires_grad_() for leaf in start if leaf.is_floating_point()]
    whole = [leaf for leaf in start if not leaf.is_floating_point()]

    def run(*floating):
        given, rest = iter(floating), iter(whole)
        state = tuple(
            type(layer)(*(next(given) if leaf.is_floating_point() else next(rest) for leaf in layer))
            if layer
            else ()
            for layer in model.init_state(2)
        )
        out = model(NEXT[:2, :2], state)
        found = [leaf for layer in out.state for leaf in layer if leaf.is_floating_point()]
        return (out.logits[..., :3], *found)

    if leaves:
        assert torch.autograd.gradcheck(run, leaves, atol=1e-7, fast_mode=True)
