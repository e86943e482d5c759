import pytest
import torch

from ssmoe.check.bench import bench
from ssmoe.config.load import preset
from ssmoe.model.build import build
from tests.model.zoo import small


@pytest.mark.parametrize("name", ["moe-mamba", "hybrid"])
def test_rows_and_their_arithmetic(name):
    model = build(small(name, repeat=1))
    rows = bench(model, batch=2, context=8, decode_tokens=3, repeats=3)
    assert [row.name for row in rows] == [
        "forward",
        "forward + backward",
        "training step",
        "prefill",
        "decode 3 tokens",
    ]
    for row, tokens in zip(rows, (16, 16, 16, 16, 8), strict=True):
        assert row.seconds > 0
        assert row.tokens_per_second == pytest.approx(tokens / row.seconds)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_cannot_generate_has_no_decoding_to_time():
    rows = bench(build(preset("mot-masked-tiny").model), batch=1, context=8, decode_tokens=1, repeats=1)
    assert [row.name for row in rows] == ["forward", "forward + backward", "training step", "prefill"]


def test_training_steps_are_real():
    model = build(small("moe-mamba", repeat=1))
    before = model.embedding.weight.detach().clone()
    bench(model, batch=1, context=4, decode_tokens=1, repeats=1)
    assert not torch.equal(model.embedding.weight, before)
