from math import cos, pi, sqrt

import pytest

from ssmoe.config.train import TrainConfig
from ssmoe.training.schedule import learning_rate


def test_warm_up_then_cosine_to_the_final_ratio():
    train = TrainConfig(steps=12, warmup_fraction=0.25, learning_rate=2.0, final_learning_rate_ratio=0.1)
    rates = [learning_rate(train, step) for step in range(12)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[3:] == pytest.approx([2 * (0.1 + 0.9 * (1 + cos(pi * i / 8)) / 2) for i in range(9)])
    assert (rates[3], rates[-1]) == pytest.approx((2.0, 0.2))


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ("cosine", lambda p: (1 + cos(pi * p)) / 2),
        ("linear", lambda p: 1 - p),
        ("wsd", lambda p: 1.0 if p <= 0.75 else 1 - sqrt((p - 0.75) / 0.25)),
        ("constant", lambda p: 1.0),
    ],
)
def test_every_schedule_is_its_formula(schedule, share):
    train = TrainConfig(
        steps=22,
        warmup_fraction=0.05,
        learning_rate=3.0,
        final_learning_rate_ratio=0.2,
        schedule=schedule,
        decay_fraction=0.25,
    )
    rates = [learning_rate(train, step) for step in range(22)]
    assert rates[0] == pytest.approx(3.0)
    assert rates[1:] == pytest.approx([3 * (0.2 + 0.8 * share(i / 20)) for i in range(21)])
    assert rates[-1] == pytest.approx(3.0 if schedule == "constant" else 0.6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (2, 0.5), (3, 0.99)])
def test_short_runs_stay_in_range(steps, warmup, schedule):
    train = TrainConfig(steps=steps, warmup_fraction=warmup, learning_rate=1.0, schedule=schedule)
    assert all(0 < learning_rate(train, step) <= 1 for step in range(steps))
