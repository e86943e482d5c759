"""Every key is listed, with a default that can be given."""

import pytest

from ssmoe.config.keys import Key, all_keys
from ssmoe.config.load import LAYERS, preset
from ssmoe.config.train import TrainConfig

KEYS = {key.name: key for key in all_keys()}
WHERE = {
    "mamba_experts": "mamba-inner-moe-tiny",
    "parallel": "moe-mamba-parallel-tiny",
    "s4d": "s4d-tiny",
} | {
    "expert_choice": "moe-mamba-expert-choice-tiny",
    "mot": "mot-mamba-tiny",
    "attention": "transformer-moe-tiny",
    "dense": "transformer-tiny",
}


def test_every_field_is_a_key() -> None:
    assert {f"train.{name}" for name in TrainConfig.model_fields} - {"train.learning_rate_ratios"} <= set(
        KEYS
    )
    for kind, layer in LAYERS.items():
        named = {name.split(".")[3] for name in KEYS if name.startswith(f"model.pattern.{kind}.")}
        assert named == set(layer.model_fields) - {"kind"}


def test_values_and_their_meaning() -> None:
    assert KEYS["train.steps"] == Key("train.steps", "1000", "")
    assert KEYS["model.pattern.moe.num_experts"].default is None
    assert KEYS["train.recompute"].default == "false"
    assert KEYS["train.threads"].default == "null"
    assert KEYS["train.precision"].description.startswith("One of float32, bfloat16. Compute dtype.")


@pytest.mark.parametrize(
    "key", [key for key in all_keys() if key.default is not None], ids=lambda key: key.name
)
def test_every_default_can_be_given(key: Key) -> None:
    kind = key.name.split(".")[2] if key.name.startswith("model.pattern.") else "mamba"
    overrides = [f"{key.name}={key.default}"]
    if kind in ("mot", "expert_choice"):
        overrides.append("train.batch_size=32")
    preset(WHERE.get(kind, "moe-mamba-tiny"), overrides)
