"""Mixture of Tokens against its formula, its one-token definition, causality and the transition."""

import pytest
import torch

from ssmoe.config.model import ModelConfig, MoTConfig
from ssmoe.generation.engine import decode
from ssmoe.generation.sampler import Sampling
from ssmoe.model.build import build
from ssmoe.model.feedforwards.moe import Experts, MoE
from ssmoe.model.feedforwards.mot import MixtureOfTokens
from ssmoe.model.feedforwards.router import Router
from ssmoe.ops import Segments
from tests.model.zoo import mixing


def make(
    group: int, *, axis: str = "batch", temperature: float = 1.0, mode: str = "mixture"
) -> MixtureOfTokens:
    torch.manual_seed(0)
    return MixtureOfTokens(
        router=Router(6, num_experts=4, z_coefficient=0.1),
        experts=Experts(6, num_experts=4, d_expert=5),
        group=group,
        axis=axis,  # pyright: ignore[reportArgumentType]
        temperature=temperature,
        mode=mode,  # pyright: ignore[reportArgumentType]
    ).double()


def expert(layer: MixtureOfTokens, e: int, x: torch.Tensor) -> torch.Tensor:
    return layer.experts.down[e] @ (layer.experts.up[e] @ x).relu()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("axis", ["batch", "sequence"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_its_formula(axis: str, temperature: float, padded: bool) -> None:
    layer = make(3, axis=axis, temperature=temperature)
    x = torch.randn(6, 6, 6, dtype=torch.float64)
    ids = torch.zeros(6, 6, dtype=torch.int32)
    if padded:
        ids[torch.rand(6, 6) < 0.4] = -1
        ids[0, :3] = ids[::2, 5] = -1  # groups of padding alone, along either axis
    real = ids >= 0
    logits = layer.router.logits(x)
    expected = torch.zeros_like(x)
    if axis == "batch":
        groups = [[(i, t), (i + 2, t), (i + 4, t)] for i in range(2) for t in range(6)]
    else:
        groups = [[(i, t), (i, t + 1), (i, t + 2)] for i in range(6) for t in (0, 3)]
    for group in groups:
        present = [place for place in group if real[place]]
        for e in range(4 if present else 0):
            w = torch.stack([logits[place][e] for place in present]).div(temperature).softmax(0)
            mixed = sum(w[j] * x[place] for j, place in enumerate(present))
            assert isinstance(mixed, torch.Tensor)
            for j, place in enumerate(present):
                expected[place] += (w[j] * expert(layer, e, mixed)).detach()
    segments = Segments(ids, torch.zeros(6, 6, dtype=torch.bool)) if padded else None
    out = layer(x, segments=segments)
    torch.testing.assert_close(out.x, expected)
    assert out.stats is not None
    assert not out.stats.balance.any()
    assert int(out.stats.load.sum()) == int(real.sum())
    out.x.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_group_of_one_gives_every_token_to_every_expert() -> None:
    layer = make(1)
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    everyone = torch.stack([expert(layer, e, x[i, t]) for i in range(3) for t in range(2) for e in range(4)])
    torch.testing.assert_close(layer(x).x.flatten(0, 1), everyone.view(6, 4, 6).sum(1))
    assert not layer.batch_dependent


def test_a_low_temperature_leaves_each_expert_one_token() -> None:
    layer = make(3, temperature=1e-9)
    x = torch.randn(3, 1, 6, dtype=torch.float64)
    best = layer.router.logits(x)[:, 0].argmax(0)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for e in range(4):
        expected[best[e]] += expert(layer, e, x[best[e], 0]).detach()
    torch.testing.assert_close(layer(x).x[:, 0], expected)


@pytest.mark.parametrize("name", ["mot", "expert-choice"])
def test_the_future_changes_nothing_in_training(name: str) -> None:
    model = build(mixing(name), seed=1).double().train()
    ids = torch.randint(61, (6, 14), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % 61
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :9], before[:, :9], rtol=0, atol=1e-12)
    other = ids.clone()
    other[1] = (other[1] + 7) % 61
    with torch.no_grad():  # and yet rows depend on one another
        assert not torch.equal(model(other).logits[2:], before[2:])


def test_an_unfilled_group_is_refused() -> None:
    with pytest.raises(ValueError, match="5 rows do not fill groups of 3: give a multiple of 3"):
        make(3)(torch.randn(5, 2, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="5 positions do not fill groups of 3"):
        make(3, axis="sequence")(torch.randn(3, 5, 6, dtype=torch.float64))


def test_as_token_choice_it_is_an_moe() -> None:
    layer = make(4, mode="token_choice")
    moe = MoE(6, num_experts=4, d_expert=5, z_coefficient=0.1).double()
    moe.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    assert torch.equal(layer(x).x, moe(x).x)
    assert not layer.batch_dependent


@pytest.mark.parametrize(("name", "remedy"), [("mot", "mode=token_choice"), ("mot-masked", 'with "causal"')])
def test_generation_is_refused_with_the_remedy(name: str, remedy: str) -> None:
    model = build(mixing(name)).eval()
    with pytest.raises(ValueError, match=remedy):
        decode(model, [[1, 2]], lambda *_: True, sampling=Sampling(1.0, None, None, 0), max_new_tokens=2)


def test_mixing_inside_the_sequence_needs_the_masked_objective() -> None:
    layer = MoTConfig(num_experts=2, d_expert=4, axis="sequence")
    with pytest.raises(ValueError, match='objective="masked"'):
        ModelConfig(vocab_size=9, d_model=4, pattern=(layer,))


def test_masked_models_look_both_ways_and_keep_documents_apart() -> None:
    model = build(mixing("mot-masked"), seed=1).double().eval()
    ids = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 7) % 61
    with torch.no_grad():
        assert (model(changed).logits - model(ids).logits)[:, 0].abs().max() > 1e-9
        documents = torch.tensor([[0] * 4 + [1] * 4] * 2, dtype=torch.int32)
        starts = torch.zeros(2, 8, dtype=torch.bool)
        starts[:, [0, 4]] = True
        packed = model(ids, segments=Segments(documents, starts)).logits
    torch.testing.assert_close(packed[:, :4], model(ids[:, :4]).logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]).logits, rtol=0, atol=1e-12)
