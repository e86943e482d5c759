"""Training configurations: refusals that name the remedy."""

import pytest
from pydantic import ValidationError

from ssmoe.config.train import TrainConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 12, "micro_batch_size": 5}, "use micro_batch_size=4"),
        ({"precision": "float16"}, "float32"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"warmup_fraction": 1}, "less than 1"),
        ({"schedule": "step"}, "'wsd' or 'constant'"),
        ({"decay_fraction": 0}, "greater than 0"),
        ({"optimizer": "sgd"}, "'adamw' or 'muon'"),
        ({"muon_momentum": 1}, "less than 1"),
        ({"muon_expert_momentum": 0}, "greater than 0"),
        ({"learning_rate_ratios": {"expert": 2}}, "expert"),
        ({"learning_rate_ratios": {"experts": 0}}, "greater than 0"),
    ],
)
def test_refusals(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(values)
