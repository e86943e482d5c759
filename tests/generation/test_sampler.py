from math import nan

import pytest
import torch

from ssmoe.generation.sampler import Sampling, choose, sample, uniform

LOGITS = torch.tensor([0.1, 3.0, 2.0, -1.0, 1.0, 2.5])
ORDER = [1, 5, 2, 4, 0, 3]
"""Tokens by falling probability."""


def draw(sampling, count=4000):
    tokens = sample(LOGITS.expand(count, -1), list(range(count)), sampling)
    return torch.bincount(torch.tensor(tokens), minlength=6).double() / count


def test_uniform_numbers_are_fixed_and_spread():
    numbers = torch.tensor([uniform(0, position) for position in range(4000)], dtype=torch.float64)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(numbers.var()) == pytest.approx(1 / 12, abs=0.005)
    assert uniform(3, 4) == uniform(3, 4)
    assert len({uniform(seed, position) for seed in range(9) for position in range(9)}) == 81
    assert uniform(-1, 0) != uniform(1, 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    expected = (LOGITS.double() / temperature).softmax(0)
    torch.testing.assert_close(draw(Sampling(temperature)), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 99])
def test_top_k_keeps_the_k_likeliest(k):
    found = draw(Sampling(3.0, top_k=k))
    assert {i for i in range(6) if found[i] > 0} == set(ORDER[:k])
    kept = torch.full((6,), -torch.inf, dtype=torch.float64)
    kept[ORDER[:k]] = LOGITS.double()[ORDER[:k]]
    torch.testing.assert_close(found, (kept / 3).softmax(0), rtol=0, atol=0.03)


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_top_p_keeps_the_fewest_that_reach_p(p):
    cumulative = LOGITS.double().softmax(0)[ORDER].cumsum(0)
    count = next((i + 1 for i in range(6) if cumulative[i] >= p), 6)
    found = draw(Sampling(1.0, top_p=p))
    assert {i for i in range(6) if found[i] > 0} == set(ORDER[:count])


def test_top_p_at_an_exact_boundary_does_not_take_one_more():
    # equal logits, whose probabilities are exact
    logits = torch.zeros(2000, 2)
    assert set(sample(logits, list(range(2000)), Sampling(1.0, top_p=0.5))) == {0}


def test_top_p_counts_what_top_k_left():
    # of the two likeliest, the first has 0.62
    found = draw(Sampling(1.0, top_k=2, top_p=0.6))
    assert {i for i in range(6) if found[i] > 0} == {1}


def test_a_row_does_not_depend_on_the_others():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    positions = [3, 1, 4, 1, 5, 9, 2]
    together = sample(logits, positions, Sampling(1.3, seed=5))
    assert together == [sample(logits[i : i + 1], [positions[i]], Sampling(1.3, seed=5))[0] for i in range(7)]
    assert together != sample(logits, positions, Sampling(1.3, seed=6))


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-9])
def test_cold_is_greedy(temperature):
    assert set(sample(LOGITS.expand(50, -1) + 1e6, list(range(50)), Sampling(temperature))) == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_of_equal_logits_the_lower_token_is_taken(dtype):
    logits = torch.tensor([[1.0, 5.0, 2.0, 5.0], [7.0, 7.0, 7.0, 7.0], [-3.0, -4.0, -3.0, -9.0]], dtype=dtype)
    assert sample(logits, [0, 1, 2], Sampling(0.0)) == [1, 0, 0]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_largest_draw_takes_the_last_token_that_is_left(k):
    """Sums of probabilities end a rounding error away from 1."""
    draws = torch.full((500,), 1 - 2.0**-53, dtype=torch.float64)
    logits = torch.randn(500, 37, generator=torch.Generator().manual_seed(0))
    found = choose(logits, draws, Sampling(0.7, top_k=k))
    last = logits.argsort(dim=-1, descending=True)[:, k - 1]
    assert torch.equal(found, last)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(-0.1), "temperature=-0.1"),
        (Sampling(nan), "temperature=nan"),
        (Sampling(top_k=0), "top_k=0"),
        (Sampling(top_p=0.0), "top_p=0.0"),
        (Sampling(top_p=1.5), "top_p=1.5"),
        (Sampling(top_p=nan), "top_p=nan"),
    ],
)
def test_values_out_of_range(sampling, message):
    with pytest.raises(ValueError, match=message):
        sampling.check()
    assert Sampling(0.0, 1, 1.0).check() == Sampling(0.0, 1, 1.0)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_ids_past_the_tokenizer_are_never_drawn(temperature):
    # without the limit, token 1 and then 5 would be the likeliest
    tokens = sample(LOGITS.expand(200, -1), list(range(200)), Sampling(temperature, num_tokens=1))
    assert set(tokens) == {0}
