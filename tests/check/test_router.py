"""The router tool against brute-force recounts; its page; and that it leaves the model as it was."""

from math import log

import numpy as np
import pytest
import torch

from ssmoe.check.router import color_tokens, inspect_routers, named_routers, token_choices
from ssmoe.data.packing import Batch
from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.model.build import build
from ssmoe.model.feedforwards.router import Router
from ssmoe.ops import Segments
from tests.model.zoo import mixing, small


def batches(n: int = 3) -> list[Batch]:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(n):
        ids = generator.integers(0, 61, (4, 9))
        documents = np.repeat(np.array([[0] * 4 + [1] * 3 + [-1] * 2], np.int32), 4, axis=0)
        starts = np.zeros((4, 9), np.bool_)
        starts[:, 4] = True
        found.append(Batch(ids, ids, documents, starts))
    return found


@pytest.mark.parametrize("name", ["moe", "moe-fine", "inner-moe", "parallel"])
def test_counts_equal_a_recount_of_every_token(name: str) -> None:
    """Packed and padded, over several batches; padding counts nowhere."""
    model = build(small(name), seed=1).double().train()
    if name == "moe-fine":
        for module in model.modules():
            if isinstance(module, Router):
                module.bias = torch.linspace(-0.1, 0.1, module.num_experts, dtype=torch.float64)
    reports = {report.name: report for report in inspect_routers(model, batches())}
    assert model.training
    assert reports.keys() == named_routers(model).keys()
    loads = {key: [0] * router.num_experts for key, router in named_routers(model).items()}
    entropies: dict[str, list[float]] = {key: [] for key in loads}
    firsts: dict[str, list[float]] = {key: [] for key in loads}

    def recount(key: str, router: Router, x: torch.Tensor) -> None:
        for row in x[:, :7].flatten(0, 1):  # the last two are padding
            scores = router.scores(router.logits(row)).detach()
            chosen = (scores if router.bias is None else scores + router.bias).topk(router.top_k).indices
            p = scores / scores.sum()
            entropies[key].append(-float((p * p.log()).sum()))
            firsts[key].append(float(p.max()))
            for e in chosen.tolist():
                loads[key][e] += 1

    model.eval()
    for key, router in named_routers(model).items():
        router.register_forward_hook(lambda r, inputs, _, key=key: recount(key, r, inputs[0]))
    for batch in batches():
        segments = Segments(torch.from_numpy(batch.documents), torch.from_numpy(batch.starts))
        model(torch.from_numpy(batch.ids), segments=segments)
    for key, report in reports.items():
        load, e = loads[key], len(loads[key])
        assert report.load == load
        assert report.max_over_mean == pytest.approx(max(load) * e / sum(load))
        assert report.dead == load.count(0)
        shares = [value / sum(load) for value in load if value]
        assert report.load_entropy == pytest.approx(-sum(s * log(s) for s in shares) / log(e))
        assert report.entropy == pytest.approx(sum(entropies[key]) / len(entropies[key]) / log(e))
        assert report.confidence == pytest.approx(sum(firsts[key]) / len(firsts[key]))
        assert report.bias == pytest.approx(0.2 if name == "moe-fine" else 0.0)


def test_mixing_layers_are_shown_as_token_choice() -> None:
    model = build(mixing("mot"), seed=1)
    [batch] = batches(1)
    odd = Batch(*(array[:3] for array in batch))  # rows that fill no group
    reports = inspect_routers(model, [odd])
    assert [report.name for report in reports] == ["1", "3"]
    assert [sum(report.load) for report in reports] == [3 * 7 * 2] * 2
    with pytest.raises(ValueError, match="do not fill groups"):
        model(torch.from_numpy(odd.ids))


def test_every_token_is_shown_with_its_experts() -> None:
    tokenizer = ByteTokenizer()
    model = build(small("inner-moe", vocab_size=257), seed=1)
    ids = tokenizer.encode("a<b> é&c")
    choices = token_choices(model, ids)
    assert [choice.name for choice in choices] == [
        f"{layer}.for_{name}" for layer in (1, 3) for name in ("conv", "gate", "out")
    ]
    assert all(len(choice.experts) == len(ids) and len(choice.experts[0]) == 2 for choice in choices)
    page = color_tokens(tokenizer, ids, choices)
    assert page.count("<span") == 6 * len(ids)
    assert page.count("<h2>") == 6
    for piece in ("&lt;", "&gt;", "é", "&amp;", 'title="expert '):
        assert piece in page
    assert not any(router._forward_hooks for router in named_routers(model).values())
