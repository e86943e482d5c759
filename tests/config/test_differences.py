"""Two runs, key by key."""

import json

from ssmoe.config.differences import differences
from ssmoe.config.load import preset


def test_equal_runs_do_not_differ_whatever_they_are_called() -> None:
    run = preset("mamba-tiny", ["data.cache_dir=/elsewhere", "name=other", "description=x"])
    assert differences(run, preset("mamba-tiny")) == {}


def test_keys_of_every_section_are_told_with_both_values() -> None:
    run = preset("mamba-tiny", ["train.learning_rate=0.5", "data.seed=3", "model.init.scale=0.2"])
    assert differences(run, preset("mamba-tiny")) == {
        "train.learning_rate": ("0.5", "0.002"),
        "data.seed": ("3", "0"),
        "model.init.scale": ("0.2", "0.1"),
    }


def test_layers_are_one_key_in_words() -> None:
    found = differences(preset("moe-mamba-tiny", ["model.pattern.moe.jitter=0.1"]), preset("mamba-tiny"))
    assert found == {
        "model.repeat": ("4", "8"),
        "model.pattern": ("[mamba] [moe jitter=0.1 num_experts=8 d_expert=448]", "[mamba]"),
    }


def test_equal_layers_in_a_row_are_counted() -> None:
    layers = [{"kind": "mamba"}] * 2 + [{"kind": "attention", "num_heads": 2}, {"kind": "mamba"}]
    run = preset("mamba-tiny", [f"model.pattern={json.dumps(layers)}"])
    assert differences(run, preset("mamba-tiny")) == {
        "model.pattern": ("2 x [mamba] [attention num_heads=2] [mamba]", "[mamba]")
    }
