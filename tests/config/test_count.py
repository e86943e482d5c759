"""Counts against the papers' tables and against torch's own FLOP counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssmoe.config.count import (
    SCAN_FLOPS,
    count_parameters,
    forward_flops,
    state_bytes,
    training_flops,
)
from ssmoe.config.load import preset
from ssmoe.config.model import MambaConfig, MoTConfig, S4DConfig
from ssmoe.model.build import build
from ssmoe.model.state import num_bytes
from tests.model.zoo import MIXING, PATTERNS, mixing, small


@pytest.mark.parametrize(
    ("name", "non_embedding", "active"),
    [
        # arXiv 2401.04081, tables 5 and 6, to the digits recomputed there
        ("moe-mamba-25m", 542.23, 26.33),
        ("moe-mamba-100m", 2439.07, 117.52),
        ("mamba-25m", 27.13, 27.13),
        ("mamba-100m", 120.72, 120.72),
        ("transformer-moe-25m", 545.41, 25.31),
        ("transformer-moe-100m", 2454.11, 113.69),
        ("transformer-25m", 25.18, 25.18),
    ],
)
def test_the_papers_parameter_counts(name: str, non_embedding: float, active: float) -> None:
    count = count_parameters(preset(name).model)
    assert round(count.non_embedding / 1e6, 2) == non_embedding
    assert round(count.active / 1e6, 2) == active


@pytest.mark.parametrize(
    ("name", "millions"), [("130m", 129), ("370m", 372), ("790m", 793), ("1.4b", 1372), ("2.8b", 2768)]
)
def test_the_published_mamba_sizes(name: str, millions: int) -> None:
    assert round(count_parameters(preset(f"mamba-{name}").model).total / 1e6) == millions


@pytest.mark.parametrize(("experts", "millions"), [(1, 26), (4, 64), (8, 114), (16, 215), (32, 416)])
def test_the_papers_expert_ablation(experts: int, millions: int) -> None:
    """arXiv 2401.04081, table 4."""
    config = preset("moe-mamba-25m", [f"model.pattern.moe.num_experts={experts}"]).model
    assert round(count_parameters(config).non_embedding / 1e6) == millions
    assert round(count_parameters(config).active / 1e6) == 26


def test_tiny_presets_have_the_same_active_size_within_ten_percent() -> None:
    names = ("moe-mamba-tiny", "mamba-tiny", "transformer-tiny", "transformer-moe-tiny")
    active = [count_parameters(preset(name).model).active for name in names]
    assert max(active) / min(active) < 1.1


@pytest.mark.parametrize("name", PATTERNS)
def test_flops_equal_torchs_counter(name: str) -> None:
    """It counts matrix products and whole attention squares; ours adds the scan and halves the squares."""
    config = small(name)
    # the convolution of S4D is counted as its recurrence, which a single position is
    length = 1 if any(isinstance(layer, S4DConfig) for layer in config.layers) else 32
    model = build(config).eval()
    # the counter knows attention by its matrix products only
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, length, dtype=torch.int64))
    ours = forward_flops(config, length)
    for layer in config.layers:
        if isinstance(layer, MambaConfig):
            ours -= layer.d_inner(16) * (SCAN_FLOPS * layer.d_state + 2 * layer.d_conv)
            # torch also counts the read-out as a product
            ours += 2 * layer.d_inner(16) * layer.d_state
        if isinstance(layer, S4DConfig):
            scan = S4D_FLOPS[layer.parametrisation] * layer.d_state
            ours -= layer.d_inner(16) * (scan + 2 * layer.d_conv)
        if isinstance(layer, MoTConfig) and layer.mode == "mixture" and layer.group == 1:
            ours -= 2 * 16 * layer.bank[0]  # a mixture of one is an outer product, no matrix product to torch
        if layer.kind == "attention":
            ours += 2 * 16 * (length - 1)
    assert counter.get_total_flops() / (2 * length) == pytest.approx(ours, rel=0.01)
    assert training_flops(config, length) == 3 * forward_flops(config, length)


@pytest.mark.parametrize("name", MIXING)
def test_flops_of_mixed_rows_equal_torchs_counter(name: str) -> None:
    config, length = mixing(name), 32
    model = build(config).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(12, length, dtype=torch.int64))
    ours = forward_flops(config, length)
    for layer in config.layers:
        if isinstance(layer, MambaConfig):
            ours -= layer.d_inner(16) * ((SCAN_FLOPS - 2) * layer.d_state + 2 * layer.d_conv)
    assert counter.get_total_flops() / (12 * length) == pytest.approx(ours, rel=0.01)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total


@pytest.mark.parametrize("name", PATTERNS)
def test_state_bytes_equal_the_states(name: str) -> None:
    config = small(name)
    assert state_bytes(config, 11) == num_bytes(build(config).init_state(1, capacity=11))
