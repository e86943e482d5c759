"""What a run tells of itself before its first step."""

from ssmoe.config.load import preset
from ssmoe.training.outline import outline


def test_sizes_and_costs_are_those_of_the_presets_table() -> None:
    run = preset(
        "moe-mamba-tiny", ["train.steps=100", "train.batch_size=4", "data.context=256", "train.tbptt=2"]
    )
    sizes, costs = outline(run, text_tokens=409_600, backend="cpu", device="a laptop")
    assert sizes.startswith("moe-mamba-tiny: 4,")
    assert "in 8 layers" in sizes
    assert "0.075 GB for weights, gradients" in sizes
    assert "100 steps of 4 rows of 512 tokens: 204,800 tokens, 0.5 times the text" in costs
    assert "1.8e+12 FLOPs; backend cpu on a laptop, float32" in costs
