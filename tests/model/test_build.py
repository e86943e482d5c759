"""Configuration to model: exact sizes, every preset, the backend that is recorded."""

import numpy as np
import pytest
import torch

from ssmoe.config.count import count_parameters
from ssmoe.config.load import preset, preset_names
from ssmoe.data.masking import hide
from ssmoe.data.packing import Batch
from ssmoe.generation.engine import decode
from ssmoe.generation.sampler import Sampling
from ssmoe.model.build import build
from ssmoe.training.optimizer import build_optimizer, parameter_groups
from ssmoe.training.step import train_step
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


def test_sizes_that_no_memory_holds_are_refused() -> None:
    config = small("mamba").model_copy(update={"d_model": 10**12})
    with pytest.raises(ValueError, match="parameters, more than any memory holds"):
        build(config, device="meta")


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, "bfloat16"])
def test_a_dtype_that_nothing_is_computed_in_is_refused(dtype: object) -> None:
    with pytest.raises(ValueError, match="is no dtype to compute in: use"):
        build(small("mamba"), dtype=dtype)  # type: ignore[arg-type]


def test_parameters_are_float32_whatever_the_compute_dtype() -> None:
    model = build(small("hybrid"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


VARIANTS = [name for name in preset_names() if name.endswith("-tiny")]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_200_steps_and_generates_or_says_why_not(name: str) -> None:
    """Each tiny preset, narrower, on a text of repeated words, through the trainer's own step."""
    run = preset(name, ["model.d_model=32", "model.vocab_size=33"])
    model = build(run.model, seed=0)
    groups = parameter_groups(model)
    optimizer = build_optimizer(groups, run.train)
    generator = np.random.default_rng(0)
    words = generator.integers(0, 32, (12, 8))
    masked = run.model.objective == "masked"
    # a row of 32 tokens has 5 targets then: as many targets a step as the others' 8 rows have
    rows = 56 if masked else 8
    losses: list[float] = []
    for step in range(200):
        text = words[generator.integers(0, 12, (rows, 5))].reshape(rows, 40)
        ids, flags = text[:, :32], np.zeros((rows, 32), np.bool_)
        batch = Batch(ids, text[:, 1:33], np.zeros((rows, 32), np.int32), flags)
        if masked:
            batch = hide(batch, mask_id=32, fraction=0.15, seed=0, number=step)
        result = train_step(model.train(), optimizer, batch, run.train, 0.005, isolate=False)
        losses.append(float(result.lm))
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < 0.8 * first, (first, last)

    model.eval()
    prompts = [words[0].tolist(), words[1, :3].tolist()]
    made: list[int] = []

    def accept(_: int, token: int) -> bool:
        made.append(token)
        return True

    reason = run.model.why_no_generation()
    if reason is None:
        decode(model, prompts, accept, sampling=Sampling(0.0, None, None, 0), max_new_tokens=8)
        assert len(made) == 16
    else:
        with pytest.raises(ValueError, match="train"):
            decode(model, prompts, accept, sampling=Sampling(0.0, None, None, 0), max_new_tokens=8)
        assert name in {
            "mot-mamba-tiny",
            "mot-transformer-tiny",
            "mot-masked-tiny",
            "moe-mamba-expert-choice-tiny",
        }


@pytest.mark.parametrize("config", ["mamba-tiny", preset("mamba-tiny")])
def test_what_is_no_model_config_is_refused(config: object) -> None:
    with pytest.raises(TypeError, match=rf"not {type(config).__name__}: ssmoe.preset\(NAME\).model is one"):
        build(config)  # pyright: ignore[reportArgumentType]
