"""Counts against the papers' tables and against torch's own FLOP counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssmoe.config.count import (
    S4D_FLOPS,
    SCAN_FLOPS,
    count_parameters,
    forward_flops,
    state_bytes,
    training_flops,
)
from ssmoe.config.load import preset
from ssmoe.config.model import (
    MambaConfig,
    MambaExpertsConfig,
    ModelConfig,
    MoTConfig,
    ParallelConfig,
    S4DConfig,
)
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


@pytest.mark.parametrize(
    ("expand", "width", "experts", "millions"),
    [
        (2 / 3, 2560, 19, 403),
        (4 / 3, 2048, 24, 412),
        (2, 1536, 32, 416),
        (8 / 3, 1024, 48, 421),
        (10 / 3, 512, 96, 426),
    ],
)
def test_the_papers_ratio_of_mamba_to_moe(expand: float, width: int, experts: int, millions: int) -> None:
    """arXiv 2401.04081, table 2."""
    moe = [f"model.pattern.moe.d_expert={width}", f"model.pattern.moe.num_experts={experts}"]
    config = preset("moe-mamba-25m", [f"model.pattern.mamba.expand={expand}", *moe]).model
    assert round(count_parameters(config).non_embedding / 1e6) == millions


def paper_model(pattern: list[dict[str, object]], repeat: int) -> ModelConfig:
    """The 25M class of arXiv 2401.04081 with other layers."""
    base = preset("moe-mamba-25m").model.model_dump()
    return ModelConfig.model_validate({**base, "pattern": pattern, "repeat": repeat})


def test_parallel_is_sequential_less_a_norm() -> None:
    """arXiv 2401.04081, section 5.1: one LayerNorm of 2 * 512 for two."""
    sequential = preset("moe-mamba-25m").model
    moe = next(layer for layer in sequential.pattern if layer.kind == "moe")
    parallel = paper_model([{"kind": "parallel", "moe": moe.model_dump()}], 8)
    one, two = count_parameters(parallel), count_parameters(sequential)
    assert two.non_embedding - one.non_embedding == two.active - one.active == 8 * 2 * 512
    assert forward_flops(parallel, 1024) == forward_flops(sequential, 1024)


@pytest.mark.parametrize("projections", [["conv"], ["gate"], ["out"], ["conv", "gate", "out"]])
def test_experts_inside_mamba_count_as_the_paper_says(projections: list[str]) -> None:
    """arXiv 2401.04081, table 3: 24 experts of hidden width 352 a block; 48 in every other one."""
    share = len(projections)
    inner = {"kind": "mamba_experts", "projections": projections, "num_experts": 24 // share}
    every = count_parameters(paper_model([inner], 16))
    other = count_parameters(paper_model([{"kind": "mamba"}, inner | {"num_experts": 48 // share}], 8))
    expert = 352 * (512 + 1024)
    inputs = {"conv": 512, "gate": 512, "out": 1024}
    router = 24 // share * sum(inputs[name] for name in projections)
    vanilla = count_parameters(preset("mamba-25m").model).non_embedding
    assert every.non_embedding == vanilla + 16 * (24 * expert - share * 512 * 1024 + router)
    assert every.active == vanilla + 16 * (share * (expert - 512 * 1024) + router)
    # the two agree but for the projections that every other block keeps
    assert other.non_embedding - every.non_embedding == 8 * share * 512 * 1024


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
    model = build(config, backend="reference").eval()  # its products are torch's, which the counter sees
    # the counter knows attention by its matrix products only
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, length, dtype=torch.int64))
    ours = forward_flops(config, length)
    for layer in config.layers:
        if isinstance(layer, MambaConfig | MambaExpertsConfig | ParallelConfig):
            mamba = layer if isinstance(layer, MambaConfig) else layer.mamba
            ours -= mamba.d_inner(16) * (SCAN_FLOPS * mamba.d_state + 2 * mamba.d_conv)
            # torch also counts the read-out as a product
            ours += 2 * mamba.d_inner(16) * mamba.d_state
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
    model = build(config, backend="reference").eval()
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
