"""Accumulated decay: additive over pieces, and the identity of one layer."""

import pytest
import torch

from ssmoe.model.build import build
from ssmoe.model.mixers.mamba import MambaState
from ssmoe.soup.capture import capture, capture_each, scans, transitions
from ssmoe.soup.mix import mix
from tests.model.zoo import small

IDS = torch.randint(61, (2, 30), generator=torch.Generator().manual_seed(0))


def test_the_state_is_the_models_and_steps_add_up() -> None:
    model = build(small("moe-mamba")).double().eval()
    whole, first = capture(model, IDS), capture(model, IDS[:, :11])
    second = capture(model, IDS[:, 11:], first.state)
    for layer in scans(model):
        torch.testing.assert_close(
            whole.state[layer].ssm, model(IDS).state[layer].ssm.detach(), rtol=0, atol=1e-14
        )
        added = first.steps[layer] + second.steps[layer]
        torch.testing.assert_close(added, whole.steps[layer], rtol=0, atol=1e-12)
    assert [steps is None for steps in whole.steps] == [False, True, False, True]
    assert [A is None for A in transitions(model)] == [False, True, False, True]


@pytest.mark.parametrize("name", ["mamba", "mamba-wide-conv", "mamba-no-conv"])
@pytest.mark.parametrize("cuts", [(11,), (2, 3, 19)])
def test_the_identity_of_one_layer(name, cuts) -> None:
    """h(s1 s2) = P(s2) h(s1) + h(s2), the convolution's window carried over the boundary."""
    model = build(small(name, repeat=1)).double().eval()
    memories, state = [], None
    for begin, end in zip((0, *cuts), (*cuts, 30), strict=True):
        if state is not None:
            state = (MambaState(state[0].conv, torch.zeros_like(state[0].ssm)),)
        memories.append(capture(model, IDS[:, begin:end], state))
        state = memories[-1].state
    mixed, whole = mix(model, memories, "decay"), capture(model, IDS)
    torch.testing.assert_close(mixed.state[0].ssm, whole.state[0].ssm, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed.state[0].conv, whole.state[0].conv, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed.steps[0], whole.steps[0], rtol=0, atol=1e-12)
    assert mixed.tokens == whole.tokens
    plain = mix(model, memories, "sum").state[0].ssm
    assert float((plain - whole.state[0].ssm).abs().max()) > 1e-6


def test_the_identity_holds_from_a_learned_beginning() -> None:
    model = build(small("mamba-learned-state", repeat=1)).double().eval()
    learned = model.layers[0].layer.ssm.initial_state
    with torch.no_grad():
        learned.normal_(generator=torch.Generator().manual_seed(0))
    first = capture(model, IDS[:, :11])
    opening = (MambaState(first.state[0].conv, model.init_state(2)[0].ssm),)
    second, whole = capture(model, IDS[:, 11:], opening), capture(model, IDS)
    mixed = mix(model, [first, second], "decay")
    torch.testing.assert_close(mixed.state[0].ssm, whole.state[0].ssm, rtol=0, atol=1e-12)
    swapped = mix(model, [second, first], "decay").state[0].ssm
    middle = mix(model, [first, second], "any-order").state[0].ssm
    torch.testing.assert_close(middle, (mixed.state[0].ssm + swapped) / 2, rtol=0, atol=1e-12)
    added = mix(model, [first, second], "sum").state[0].ssm
    zero = MambaState(first.state[0].conv, torch.zeros_like(learned).repeat(2, 1, 1))
    free = capture(model, IDS[:, 11:], (zero,)).state[0].ssm
    zero = MambaState(torch.zeros_like(zero.conv), zero.ssm)
    free = free + capture(model, IDS[:, :11], (zero,)).state[0].ssm
    torch.testing.assert_close(added, free + learned.detach(), rtol=0, atol=1e-12)


def test_texts_read_together_leave_what_each_leaves_alone() -> None:
    model = build(small("moe-mamba")).double().eval()
    texts = [IDS[0, :n].tolist() for n in (7, 1, 30, 13)]
    for text, found in zip(texts, capture_each(model, texts), strict=True):
        alone = capture(model, torch.tensor([text]))
        assert found.tokens == alone.tokens
        for layer in scans(model):
            for one, other in zip(found.state[layer], alone.state[layer], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
            torch.testing.assert_close(found.steps[layer], alone.steps[layer], rtol=0, atol=1e-12)
    for nothing in ([], [[1], []]):
        with pytest.raises(ValueError, match="has no tokens"):
            capture_each(model, nothing)


def test_states_that_are_no_sums_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 2 \(Attention\) has a state that cannot be mixed"):
        capture(build(small("hybrid")), IDS)
