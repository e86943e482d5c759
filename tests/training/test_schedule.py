from math import cos, pi

import pytest

from ssmoe.config.train import TrainConfig
from ssmoe.training.schedule import learning_rate


def test_warm_up_then_cosine_to_the_final_ratio():
    train = TrainConfig(steps=12, warmup_fraction=0.25, learning_rate=2.0, final_learning_rate_ratio=0.1)
    rates = [learning_rate(train, step) for step in range(12)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[3:] == pytest.approx([2 * (0.1 + 0.9 * (1 + cos(pi * i / 8)) / 2) for i in range(9)])
    assert (rates[3], rates[-1]) == pytest.approx((2.0, 0.2))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (2, 0.5), (3, 0.99)])
def test_short_runs_stay_in_range(steps, warmup):
    train = TrainConfig(steps=steps, warmup_fraction=warmup, learning_rate=1.0)
    assert all(0 < learning_rate(train, step) <= 1 for step in range(steps))
