import pytest
import torch

import ssmoe
from ssmoe.config.train import TrainConfig
from ssmoe.model.build import build
from ssmoe.training.captured import why_not
from tests.model.zoo import PATTERNS, small
from tests.training.captured_cases import CASES, differences


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", list(CASES))
def test_a_captured_step_is_the_same_step(name):
    assert set(differences(name).values()) == {0.0}


def reason(name, *, isolate=False, **train):
    """As if the model of a pattern were on a GPU with our kernels."""
    model = build(small(name, repeat=1), backend="reference").to("meta")
    model.ops = model.ops._replace(name="triton")

    class Device:
        type = "cuda"

    class Weight:
        device = Device()

    class Embedding:
        weight = Weight()

    del model.embedding
    object.__setattr__(model, "embedding", Embedding())
    return why_not(model, TrainConfig(**train), isolate=isolate)


@pytest.mark.parametrize("name", list(PATTERNS))
def test_what_waits_for_the_host_is_not_captured(name):
    waits = name in ("s4d", "s4d-real", "conv-experts", "inner-moe", "rom", "parallel")
    assert (reason(name) is not None) == waits


def test_reasons():
    assert "learned state" in reason("mamba-learned-state", isolate=True)
    assert "documents" in reason("attention", isolate=True)
    assert "tbptt" in reason("mamba", tbptt=2)
    assert reason("mamba", recompute=True) is None
    model = ssmoe.build(small("mamba", repeat=1))
    assert "cpu" in why_not(model, TrainConfig(), isolate=False)
