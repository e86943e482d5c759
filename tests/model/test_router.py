"""The router: closed forms of its losses, top-k, the drop order, and statistics against recounts."""

from math import log

import pytest
import torch
from torch import Tensor

from ssmoe.model.feedforwards.router import Router
from ssmoe.ops import Segments


def with_logits(logits: Tensor, **options: float | int | None) -> tuple[Router, Tensor]:
    """A router over (b, l, e) inputs whose weight is the identity, so that its input is its logits."""
    e = logits.shape[-1]
    router = Router(e, num_experts=e, **options).double()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        router.weight.copy_(torch.eye(e, dtype=torch.float64))
    return router, logits.double()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("e", [4, 7])
def test_uniform_routing_costs_the_coefficient(e: int, k: int) -> None:
    # equal probabilities; the assignments spread evenly by cycling tiny leads
    lead = 1e-13 * torch.stack([torch.roll(torch.arange(e, 0, -1), i) for i in range(e)]).double()
    router, x = with_logits(lead.unsqueeze(0), top_k=k, balance_coefficient=0.01)
    with torch.no_grad():
        stats = router(x).stats
    assert stats.load.tolist() == [k] * e
    assert float(stats.balance.detach()) == pytest.approx(0.01, rel=1e-9)
    assert float(stats.entropy) == pytest.approx(log(e), rel=1e-9)


def test_all_to_one_expert_costs_the_coefficient_times_experts() -> None:
    logits = torch.zeros(2, 5, 6)
    logits[..., 3] = 1000
    router, x = with_logits(logits, balance_coefficient=0.01)
    with torch.no_grad():
        stats = router(x).stats
    assert stats.load.tolist() == [0, 0, 0, 10, 0, 0]
    assert float(stats.balance.detach()) == pytest.approx(0.06, rel=1e-12)
    assert float(stats.confidence) == pytest.approx(1)
    assert float(stats.entropy) == pytest.approx(0, abs=1e-12)


def test_balance_and_z_equal_their_formulas_and_gradients() -> None:
    torch.manual_seed(0)
    router, x = with_logits(torch.randn(2, 9, 5), top_k=2, balance_coefficient=0.3, z_coefficient=0.2)
    x.requires_grad_()
    routing = router(x)
    flat = x.reshape(-1, 5)
    p = flat.softmax(-1)
    share = torch.zeros(5, dtype=torch.float64)
    for row in p.topk(2).indices:
        share[row] += 1 / (18 * 2)
    balance = 0.3 * 5 * (share * p.mean(0)).sum()
    z = 0.2 * flat.logsumexp(-1).square().mean()
    torch.testing.assert_close(routing.stats.balance, balance)
    torch.testing.assert_close(routing.stats.z, z)
    found = torch.autograd.grad(routing.stats.balance + routing.stats.z, x, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(balance + z, x))


def test_weights_are_the_probabilities_and_differentiable() -> None:
    torch.manual_seed(0)
    router, x = with_logits(torch.randn(1, 4, 6), top_k=3)
    routing = router(x.requires_grad_())
    expected = x[0].softmax(-1).topk(3)
    torch.testing.assert_close(routing.weight, expected.values)
    assert torch.equal(routing.expert, expected.indices.to(torch.int32))
    assert routing.weight.requires_grad


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ties_go_to_the_lower_expert(k: int) -> None:
    router, x = with_logits(torch.zeros(1, 3, 4), top_k=k)
    assert router(x).expert.tolist() == [list(range(k))] * 3


def brute_force_drop(expert: Tensor, real: Tensor, capacity: int) -> Tensor:
    """(b, l, k): claims in the order (position, row, rank)."""
    kept, taken = expert.clone(), dict[int, int]()
    b, length, k = expert.shape
    for t in range(length):
        for row in range(b):
            for rank in range(k):
                e = int(expert[row, t, rank])
                if not real[row, t] or taken.get(e, 0) >= capacity:
                    kept[row, t, rank] = -1
                else:
                    taken[e] = taken.get(e, 0) + 1
    return kept


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity_drops_in_the_stated_order(k: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(3, 10, 4, generator=generator)
    router, x = with_logits(logits, top_k=k, capacity_factor=0.9)
    ids = (
        torch.randint(-1, 2, (3, 10), generator=generator, dtype=torch.int32)
        if padded
        else torch.zeros(3, 10)
    )
    segments = Segments(ids, torch.zeros(3, 10, dtype=torch.bool)) if padded else None
    real = ids >= 0
    choice = x.softmax(-1).topk(k).indices
    capacity = int(0.9 * k * int(real.sum()) / 4)
    expected = brute_force_drop(choice, real, capacity)
    routing = router.train()(x, segments)
    assert torch.equal(routing.expert.view(3, 10, k).long(), expected)
    counted = choice[real].flatten().bincount(minlength=4)
    assert routing.stats.load.tolist() == counted.tolist()
    assert int(routing.stats.dropped) == int(real.sum()) * k - int((expected >= 0).sum())
    assert int(routing.stats.dropped) > 0
    assert (router.eval()(x, segments).expert.view(3, 10, k)[real] >= 0).all()


def test_a_later_position_never_displaces_an_earlier_one() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 12, 4)
    router, x = with_logits(logits, capacity_factor=1.0)
    before = router.train()(x).expert.view(3, 12)
    changed = x.clone()
    changed[:, 7:] = torch.randn(3, 5, 4)
    after = router(changed).expert.view(3, 12)
    assert torch.equal(before[:, :7], after[:, :7])


def test_padding_is_counted_nowhere() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 5)
    ids = torch.tensor([[0, 0, 0, -1, -1, -1], [-1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    router, x = with_logits(logits, top_k=2, z_coefficient=0.1)
    padded = router(x, Segments(ids, torch.zeros(2, 6, dtype=torch.bool)))
    alone = router(x[ids >= 0].unsqueeze(0))
    for name, value in padded.stats._asdict().items():
        torch.testing.assert_close(value, getattr(alone.stats, name), msg=name)
    real = (ids >= 0).flatten()
    assert torch.equal(padded.weight[real], alone.weight)
    assert not padded.weight[~real].any()
    assert bool((padded.expert[~real] == -1).all())


def test_the_router_scores_in_float32_after_a_cast() -> None:
    router = Router(8, num_experts=4).to(torch.bfloat16)
    assert router.weight.dtype == torch.float32
    assert router(torch.randn(1, 3, 8).bfloat16()).weight.dtype == torch.float32
    assert router.double().weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("score", "normalise", "scale"),
    [("softmax", False, 1.0), ("softmax", True, 1.0), ("sigmoid", True, 2.5), ("sigmoid", False, 1.0)],
)
def test_weights_of_switch_mixtral_deepseek_and_the_loss_free_paper(
    score: str, normalise: bool, scale: float
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 6, 5)
    router, x = with_logits(logits, top_k=2, score=score, normalise_weights=normalise, weight_scale=scale)
    routing = router(x)
    chosen = x[0].topk(2)
    if score == "softmax":
        expected = chosen.values.softmax(-1) if normalise else x[0].softmax(-1).gather(1, chosen.indices)
    else:
        expected = chosen.values.sigmoid()
        expected = expected / expected.sum(-1, keepdim=True) if normalise else expected
    assert torch.equal(routing.expert.long(), chosen.indices)
    torch.testing.assert_close(routing.weight, scale * expected)


def test_the_bias_chooses_and_never_weighs() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0]]])
    router, x = with_logits(logits, score="sigmoid", balance="bias")
    assert router.bias is not None
    router.bias.copy_(torch.tensor([-1.0, -0.125, 0.0]))
    routing = router(x)
    assert routing.expert.tolist() == [[1]]
    torch.testing.assert_close(routing.weight[0, 0], x[0, 0, 1].sigmoid())
    assert not routing.stats.balance.any()


@pytest.mark.parametrize("update", ["sign", "error"])
def test_the_bias_moves_against_the_load_and_has_mean_zero(update: str) -> None:
    router, _ = with_logits(torch.zeros(1, 1, 4), balance="bias", bias_update=update, bias_rate=0.1)
    load = torch.tensor([10, 2, 0, 0])
    router.rebalance(load)
    step = {"sign": [-1.0, 1.0, 1.0, 1.0], "error": [-7 / 3, 1 / 3, 1.0, 1.0]}[update]
    expected = 0.1 * torch.tensor(step, dtype=torch.float64)
    assert router.bias is not None
    torch.testing.assert_close(router.bias, expected - expected.mean())
    even = router.bias.clone()
    router.rebalance(torch.tensor([3, 3, 3, 3]))
    torch.testing.assert_close(router.bias, even)


def test_the_bias_is_saved_and_no_parameter() -> None:
    router = Router(8, num_experts=4, balance="bias").to(torch.bfloat16)
    assert router.bias is not None
    assert router.bias.dtype == torch.float32
    assert set(router.state_dict()) == {"weight", "bias"}
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert set(Router(8, num_experts=4).state_dict()) == {"weight"}


def test_sigmoid_scores_are_balanced_by_their_shares() -> None:
    torch.manual_seed(1)
    router, x = with_logits(torch.randn(2, 4, 3), score="sigmoid", balance_coefficient=0.5)
    scores = x.reshape(-1, 3).sigmoid()
    share = scores.argmax(-1).bincount(minlength=3) / 8
    p = (scores / scores.sum(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(router(x).stats.balance, 0.5 * 3 * (share * p).sum())


def test_jitter_is_off_by_default_and_in_eval_mode() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 20, 4)
    router, x = with_logits(logits, jitter=0.5)
    assert not torch.equal(router.train()(x).weight, router(x).weight)
    router.eval()
    assert torch.equal(router(x).weight, router(x).weight)
    plain, _ = with_logits(logits)
    assert torch.equal(plain.train()(x).weight, router(x).weight)


def test_jitter_is_even_on_both_sides_of_one() -> None:
    torch.manual_seed(0)
    router, x = with_logits(torch.ones(1, 5000, 4), jitter=0.5)
    found = router.train().logits(x).detach()
    assert float(found.min()) == pytest.approx(0.5, abs=0.01)
    assert float(found.max()) == pytest.approx(1.5, abs=0.01)
    assert float(found.mean()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("k", [1, 7, 16, 17, 20])
def test_many_choices_are_those_of_a_stable_sort(k: int) -> None:
    logits = torch.randint(0, 6, (1, 50, 20), generator=torch.Generator().manual_seed(0)).double()
    router, x = with_logits(logits, top_k=k, score="sigmoid")
    expected = logits[0].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(router(x).expert.long(), expected)
