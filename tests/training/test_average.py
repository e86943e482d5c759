"""The running average of weights against the sum that defines it."""

import pytest
import torch
from torch import nn

from ssmoe.training.average import Average


def walk(share, steps):
    """The averages after each step of a scalar that takes given values."""
    module = nn.Linear(1, 1, bias=False).double()
    average = Average(module, share)
    found = []
    for step, value in enumerate(steps, 1):
        with torch.no_grad():
            module.weight.fill_(value)
        average.update(step)
        with average.applied():
            found.append(float(module.weight.detach()))
        assert float(module.weight.detach()) == value
    return found


def test_the_first_average_is_the_first_weights() -> None:
    assert walk(0.05, [3.0])[0] == 3.0


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2])
def test_the_mean_age_is_the_share_of_the_steps(share: float) -> None:
    # weights equal to the step's number: what they lack of the last step is their mean age
    steps = 2000
    age = steps - walk(share, [float(i) for i in range(1, steps + 1)])[-1]
    assert age / steps == pytest.approx(share, rel=0.05)


def test_equal_weights_for_a_share_of_a_half() -> None:
    assert walk(0.5, [1.0, 2.0, 6.0])[-1] == pytest.approx(3.0)
