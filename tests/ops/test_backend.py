"""Choosing a backend: names, "auto", and the refusal to fall back."""

import inspect

import pytest

from ssmoe import ops


def test_auto_on_a_cpu_loads() -> None:
    loaded = ops.load("auto", "cpu")
    assert loaded.name in ops.BACKENDS


def test_auto_on_a_cpu_without_kernels_is_the_reference_and_a_name_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops.extension, "missing", lambda: "not built")
    assert ops.resolve("auto", "cpu") == "reference"
    assert ops.resolve("cpu", "cpu") == "cpu"


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'native' is not one of: auto, reference"):
        ops.resolve("native", "cpu")


def test_auto_never_falls_back_on_a_device_without_kernels() -> None:
    with pytest.raises(ValueError, match="backend='reference'"):
        ops.resolve("auto", "mps")


def test_a_named_backend_stays_named() -> None:
    assert ops.resolve("reference", "mps") == "reference"


OPS = (
    "selective_scan",
    "causal_conv1d",
    "expert_mlp",
    "expert_linear",
    "embedding",
    "linear",
    "head_cross_entropy",
    "residual_norm",
    "residual_sum",
    "route",
    "wide_linear",
    "split_linear",
    "fork_linear",
    "fork_wide",
    "mamba_step",
    "mamba_steps",
    "argmax",
)


@pytest.mark.parametrize("name", OPS)
def test_every_backend_has_the_reference_signature(name: str) -> None:
    reference = inspect.signature(getattr(ops.load("reference"), name))
    for backend in ops.BACKENDS:
        try:
            loaded = ops.load(backend)
        except ModuleNotFoundError:
            continue
        assert inspect.signature(getattr(loaded, name)) == reference
