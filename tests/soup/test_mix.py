"""Ways of mixing, each against its definition."""

from itertools import permutations

import pytest
import torch

from ssmoe.model.build import build
from ssmoe.soup.capture import capture
from ssmoe.soup.mix import METHODS, mix
from tests.model.zoo import small

MODEL = build(small("moe-mamba")).double().eval()
MEMORIES = [
    capture(MODEL, torch.randint(61, (2, n), generator=torch.Generator().manual_seed(n)))
    for n in (5, 9, 3, 7)
]
STATES = torch.stack([memory.state[2].ssm for memory in MEMORIES])


def scan(method, **options):
    return mix(MODEL, MEMORIES, method, **options).state[2].ssm


def test_means_and_sums() -> None:
    torch.testing.assert_close(scan("mean"), STATES.mean(0))
    torch.testing.assert_close(scan("sum"), STATES.sum(0))
    weighted = (2 * STATES[0] + STATES[1] + STATES[3]) / 4
    torch.testing.assert_close(scan("mean", weights=[2, 1, 0, 1]), weighted)


@pytest.mark.parametrize("method", METHODS)
def test_a_mixture_has_read_all_or_their_mean(method) -> None:
    """Its steps are what a text that follows finds decayed: of all texts where all of them are in it."""
    mixed = mix(MODEL, MEMORIES, method)
    steps = torch.stack([memory.steps[2] for memory in MEMORIES])
    expected = steps.sum(0) if method in ("sum", "decay", "any-order") else steps.mean(0)
    torch.testing.assert_close(mixed.steps[2], expected)
    assert mixed.steps[1] is None
    assert mixed.tokens == 5 + 9 + 3 + 7


def test_the_norm_is_kept() -> None:
    norms = scan("norm-kept").flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, STATES.flatten(2).norm(dim=-1).mean(0))
    cosine = torch.nn.functional.cosine_similarity(scan("norm-kept").flatten(1), scan("mean").flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_any_order_is_the_mean_over_all_orders() -> None:
    orders = [mix(MODEL, order, "decay").state[2].ssm for order in permutations(MEMORIES)]
    torch.testing.assert_close(scan("any-order"), torch.stack(orders).mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_one_memory_is_itself_and_a_mixture_continues(method) -> None:
    alone = mix(MODEL, MEMORIES[:1], method)
    torch.testing.assert_close(alone.state[0].ssm, MEMORIES[0].state[0].ssm)
    mixed = mix(MODEL, MEMORIES, method)
    assert torch.equal(mixed.state[0].conv, MEMORIES[-1].state[0].conv)
    assert MODEL(torch.tensor([[1, 2], [3, 4]]), mixed.state).logits.isfinite().all()
    assert mixed.tokens == 24


def test_refusals() -> None:
    for arguments, says in (
        (([], "mean"), "nothing to mix"),
        ((MEMORIES, "stir"), "'stir' is not one of: mean, sum"),
        ((MEMORIES, "sum", [1, 1, 1, 1]), "only with mean"),
        ((MEMORIES, "mean", [1]), r"1 weights \[1\] for mean of 4"),
        ((MEMORIES, "mean", [1, -1, 0, 0]), "adding up to 0"),
        ((MEMORIES, "mean", [1, float("nan"), 0, 0]), "finite"),
        ((MEMORIES, "mean", [1, float("inf"), 0, 0]), "finite"),
    ):
        with pytest.raises(ValueError, match=says):
            mix(MODEL, *arguments)
