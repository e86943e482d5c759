"""Configuration to model: exact sizes, every preset, the backend that is recorded."""

import pytest
import torch

from ssmoe.config.count import count_parameters
from ssmoe.config.load import preset, preset_names
from ssmoe.model.build import build
from tests.model.zoo import PATTERNS, small


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_as_many_parameters_as_counted(name: str) -> None:
    config = preset(name).model
    model = build(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_every_pattern_has_as_many_parameters_as_counted(name: str, norm: str) -> None:
    config = small(name, norm=norm, tied_embeddings=False, head_bias=True)
    assert sum(p.numel() for p in build(config).parameters()) == count_parameters(config).total


def test_the_backend_is_recorded() -> None:
    assert build(small("mamba"), backend="reference").backend == "reference"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast' is not one of"):
        build(small("mamba"), backend="fast")


def test_parameters_are_float32_whatever_the_compute_dtype() -> None:
    model = build(small("hybrid"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
