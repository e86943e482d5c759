"""Expert choice against a recount, its causality, and what it becomes as token choice."""

import pytest
import torch

from ssmoe.config.model import ExpertChoiceConfig, ModelConfig
from ssmoe.model.build import build
from ssmoe.model.feedforwards.expert_choice import ExpertChoice
from ssmoe.model.feedforwards.mode import token_choice
from ssmoe.model.feedforwards.moe import Experts, MoE
from ssmoe.model.feedforwards.router import Router
from ssmoe.ops import Segments
from tests.model.zoo import mixing


def make(e: int = 4, top_k: int = 1, **options: object) -> ExpertChoice:
    torch.manual_seed(0)
    router = Router(6, num_experts=e, top_k=top_k, z_coefficient=0.1, weight_scale=1.5)
    return ExpertChoice(6, router=router, experts=Experts(6, num_experts=e, d_expert=5), **options).double()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_a_loop_over_positions_and_experts(top_k: int, padded: bool) -> None:
    layer = make(top_k=top_k)
    x = torch.randn(9, 5, 6, dtype=torch.float64)
    ids = torch.randint(-1, 1, (9, 5), dtype=torch.int32) if padded else torch.zeros(9, 5, dtype=torch.int32)
    ids[:, 4] = -1 if padded else 0  # a position without a single token
    real = ids >= 0
    expected, load, taken = torch.zeros_like(x), torch.zeros(4, dtype=torch.int64), torch.zeros(9, 5)
    for t in range(5):
        rows = [i for i in range(9) if real[i, t]]
        p = layer.router(x[:, t : t + 1]).weight.new_zeros(9, 4)
        p[:] = layer.router.scores(layer.router.logits(x[:, t]))
        for e in range(4):
            best = sorted(rows, key=lambda i, p=p, e=e: -float(p[i, e].detach()))
            for i in best[: max(1, len(rows) * top_k // 4)]:
                hidden = (layer.experts.up[e] @ x[i, t]).relu()
                expected[i, t] += (1.5 * p[i, e] * (layer.experts.down[e] @ hidden)).detach()
                load[e] += 1
                taken[i, t] += 1
    segments = Segments(ids, torch.zeros(9, 5, dtype=torch.bool)) if padded else None
    out = layer(x, segments=segments)
    torch.testing.assert_close(out.x, expected)
    assert out.stats is not None
    assert torch.equal(out.stats.load, load)
    assert int(out.stats.dropped) == int(((taken == 0) & real).sum())
    assert float(out.stats.z.detach()) > 0
    assert not out.stats.balance.any()


def test_over_the_batch_the_best_tokens_anywhere_win() -> None:
    layer = make(group="batch")
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    scores = layer.router.scores(layer.router.logits(x)).flatten(0, 1)
    expected = torch.zeros(16, 6, dtype=torch.float64)
    for e in range(4):
        for i in scores[:, e].topk(4).indices:
            hidden = (layer.experts.up[e] @ x.flatten(0, 1)[i]).relu()
            expected[i] += 1.5 * scores[i, e] * (layer.experts.down[e] @ hidden)
    torch.testing.assert_close(layer(x).x.flatten(0, 1), expected)


@pytest.mark.parametrize(("group", "leaks"), [("position", False), ("batch", True)])
def test_only_the_opted_in_group_sees_the_future(group: str, leaks: bool) -> None:
    layer = make(group=group).train()
    x = torch.randn(8, 10, 6, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6:] = torch.randn(8, 4, 6, dtype=torch.float64)
    difference = (layer(changed).x - layer(x).x)[:, :6].abs().max()
    assert (float(difference.detach()) > 1e-6) is leaks


def test_the_load_is_even_by_construction() -> None:
    layer = make(e=4)
    out = layer(torch.randn(8, 3, 6, dtype=torch.float64))
    assert out.stats is not None
    assert out.stats.load.tolist() == [6] * 4


def test_as_token_choice_it_is_an_moe() -> None:
    layer = make(top_k=2, mode="token_choice")
    moe = MoE(6, num_experts=4, d_expert=5, top_k=2, z_coefficient=0.1, weight_scale=1.5).double()
    moe.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x).x, moe(x).x, rtol=0, atol=0)
    assert not layer.batch_dependent
    assert make().batch_dependent


def test_the_mode_can_be_changed_for_a_while() -> None:
    model = build(mixing("expert-choice"), seed=1).double().eval()
    ids = torch.randint(61, (6, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        with token_choice(model) as changed:
            assert changed
            inside = model(ids).logits
            torch.testing.assert_close(model(ids[:1]).logits, inside[:1], rtol=0, atol=1e-12)
        assert torch.equal(model(ids).logits, before)
    assert not torch.equal(inside, before)


def test_a_leaking_group_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match="allow_noncausal_routing=true"):
        ExpertChoiceConfig(num_experts=2, d_expert=4, group="batch")
    ExpertChoiceConfig(num_experts=2, d_expert=4, group="batch", allow_noncausal_routing=True)


@pytest.mark.parametrize("group", ["position", "batch"])
def test_generation_is_refused_with_the_remedy(group: str) -> None:
    layer = ExpertChoiceConfig.model_validate(
        {"num_experts": 2, "d_expert": 4, "group": group, "allow_noncausal_routing": True}
    )
    reason = ModelConfig(vocab_size=9, d_model=4, pattern=(layer,)).why_no_generation()
    assert reason is not None
    assert "model.pattern.expert_choice.mode=token_choice" in reason
    after = layer.model_copy(update={"mode": "token_choice"})
    assert ModelConfig(vocab_size=9, d_model=4, pattern=(after,)).why_no_generation() is None
