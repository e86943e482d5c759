"""Near-ties are found in every kind of router, and reach as far as they should."""

import pytest
import torch

from ssmoe.check.ties import clear
from ssmoe.model.build import build
from ssmoe.model.feedforwards.router import Router
from tests.model.zoo import PATTERNS, mixing, small

X = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer_of(config, number):
    return build(config, seed=1).double().eval().layers[number]


def routers(layer):
    return {name.rpartition(".")[2]: part for name, part in layer.named_modules() if isinstance(part, Router)}


@pytest.mark.parametrize("name", PATTERNS)
def test_random_choices_are_clear(name):
    for layer in build(small(name, repeat=1), seed=1).double().eval().layers:
        assert clear(layer, X).all()


@pytest.mark.parametrize(("name", "number"), [("moe", 0), ("expert-choice", 1), ("mot", 1), ("parallel", 0)])
def test_two_experts_alike_tie_where_they_are_the_edge(name, number):
    layer = layer_of(small(name), number)
    [router] = routers(layer).values()
    with torch.no_grad():
        router.weight[1] = router.weight[0]
    scores = router.scores(router.logits(layer.norm(X)))
    better = (scores > scores[..., :1] + 1e-9).sum(-1)
    tied = better == router.top_k - 1
    assert tied.any()
    assert torch.equal(clear(layer, X), ~tied)


def test_a_balancing_bias_can_make_a_tie():
    layer = layer_of(small("moe-fine"), 1)
    [router] = routers(layer).values()
    scores = router.scores(router.logits(layer.norm(X)))[2, 5]
    order = scores.argsort(descending=True)
    k = router.top_k
    with torch.no_grad():
        router.bias[order[k]] = scores[order[k - 1]] - scores[order[k]] - 1e-7
    assert not clear(layer, X)[2, 5]


@pytest.mark.parametrize(
    ("name", "router", "later"),
    [
        ("inner-moe", "for_conv", True),
        ("inner-moe", "for_gate", False),
        ("inner-moe", "for_out", False),
        ("rom", "shared", True),
    ],
)
def test_a_tie_before_the_scan_reaches_all_later_positions(name, router, later, monkeypatch):
    layer = layer_of(small(name), 1 if name == "inner-moe" else 0)
    found = routers(layer)[router]
    logits, expected = found.logits, clear(layer, X)
    assert expected[1].all()

    def tied(x):
        values = logits(x).clone()
        values[1, 4] = 0  # all experts alike at one position of one row
        return values

    monkeypatch.setattr(found, "logits", tied)
    expected[1, 4 : 12 if later else 5] = False
    assert torch.equal(clear(layer, X), expected)


@pytest.mark.parametrize("group", ["position", "batch"])
def test_rows_alike_tie_where_an_expert_must_leave_one(group):
    layer = layer_of(mixing("expert-choice"), 1)
    layer.layer.group = group
    x = X.clone()
    x[3, 7] = x[0, 7]
    found = clear(layer, x)
    scores = layer.layer.router.scores(layer.layer.router.logits(layer.norm(x)))
    groups = scores[:, 7] if group == "position" else scores.flatten(0, 1)
    room = max(1, len(groups) * layer.layer.router.top_k // groups.shape[1])
    ordered = groups.sort(0, descending=True).values
    same = ((ordered[room - 1] == ordered[room]) & (ordered[room] == scores[0, 7])).any()
    assert bool(found[0, 7]) == bool(found[3, 7]) == (not same)
    others = found.clone()
    others[[0, 3], 7] = True
    assert others.all()
    assert clear(layer, X).all()
