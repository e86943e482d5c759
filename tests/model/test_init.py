"""The initialisation tables: statistics, and independence from device and order."""

from math import sqrt
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from ssmoe.config.model import InitConfig, MambaConfig, ModelConfig, MoEConfig
from ssmoe.model.build import build
from ssmoe.model.init import init_weights
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.model.mixers.s4d import S4D
from tests.model.zoo import small


def paper(**init: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=500,
        d_model=64,
        pattern=(MambaConfig(), MoEConfig(num_experts=4, d_expert=96)),
        repeat=2,
        norm="layernorm",
        final_norm=False,
        tied_embeddings=False,
        head_bias=True,
        init=InitConfig.model_validate({"scheme": "moe_mamba", **init}),
    )


def test_the_papers_truncated_normals() -> None:
    values = build(paper()).state_dict()
    for name, std in {
        "layers.1.layer.experts.up": sqrt(0.1 / 64),
        "layers.1.layer.experts.down": sqrt(0.1 / (4 * 96)),
        "layers.1.layer.router.weight": sqrt(0.1 / 64),
        "head.weight": sqrt(0.1 / 64),
        # nominally sqrt(0.1), cut at 0.2
        "embedding.weight": 0.112,
    }.items():
        assert abs(float(values[name].std()) / std - 1) < 0.15, name
        assert float(values[name].abs().max()) <= 0.2
    assert not values["head.bias"].any()
    assert (values["layers.0.norm.weight"] == 1).all()
    assert not values["layers.0.norm.bias"].any()


def test_the_fan_in_of_one_expert_is_an_option() -> None:
    down = build(paper(expert_fan_in="expert")).state_dict()["layers.1.layer.experts.down"]
    assert abs(float(down.std()) / sqrt(0.1 / 96) - 1) < 0.1


@pytest.mark.parametrize("scheme", ["mamba", "moe_mamba"])
@pytest.mark.parametrize("name", ["moe-fine", "inner-moe", "parallel", "hybrid"])
def test_factors_reach_experts_and_routers_alone(scheme: str, name: str) -> None:
    factors = {"expert_up_factor": 2.0, "expert_down_factor": 0.5, "router_factor": 0.25}
    plain = build(small(name, init={"scheme": scheme}))
    scaled = build(small(name, init={"scheme": scheme, **factors})).state_dict()
    seen = set[float]()
    for key, values in plain.named_parameters():
        factor, last = 1.0, key.rpartition(".")[2]
        if values.ndim == 3:
            factor = 0.5 if last == "down" else 2.0
        elif "router" in key:
            factor = 0.25
        seen.add(factor)
        torch.testing.assert_close(scaled[key], values.detach() * factor, rtol=0, atol=0)
    assert seen == {1.0, 2.0, 0.5, 0.25}


def test_mamba_scales_outputs_by_depth() -> None:
    shallow = build(small("mamba", repeat=1)).get_parameter("layers.0.layer.out_proj.weight")
    deep = build(small("mamba", repeat=16)).get_parameter("layers.0.layer.out_proj.weight")
    torch.testing.assert_close(deep * 4, shallow)
    embedding = build(small("mamba")).embedding.weight.detach()
    assert abs(float(embedding.std()) / 0.02 - 1) < 0.1


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("attention", {"o_proj.weight", "down.weight"}), ("moe-fine", {"out_proj.weight", "experts.down"})],
)
def test_mamba_scales_the_last_projection_of_every_kind_by_depth(name: str, outputs: set[str]) -> None:
    shallow, deep = (build(small(name, repeat=n)) for n in (1, 16))
    seen = set[str]()
    for key, values in shallow.named_parameters():
        ends = next((end for end in outputs if key.endswith("." + end)), None)
        if ends is not None and not key.endswith("shared.down.weight"):
            seen.add(ends)
            torch.testing.assert_close(deep.get_parameter(key) * 4, values, msg=key)
    assert seen == outputs


def test_step_sizes_begin_at_a_ten_thousandth_at_least() -> None:
    steps = F.softplus(Mamba(32, dt_min=1e-7, dt_max=1e-2).ssm.delta_bias.detach())
    assert float(steps.min()) == pytest.approx(1e-4, rel=1e-3)
    assert float(steps.max()) > 1e-3


@pytest.mark.parametrize("parametrisation", ["real", "complex"])
def test_the_outputs_of_s4d_have_mean_square_one(parametrisation: Literal["real", "complex"]) -> None:
    C = S4D(128, d_state=64, parametrisation=parametrisation).get_parameter("ssm.C").detach()
    squares = C.square().sum(-1) if parametrisation == "complex" else C.square()
    assert float(squares.mean()) == pytest.approx(1, rel=0.03)


def test_values_depend_on_seed_and_name_alone() -> None:
    one, two, other = (build(small("hybrid"), seed=seed) for seed in (3, 3, 4))
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        random = a.std() > 0 and not name.endswith("A_log")
        assert torch.equal(a, c) is not bool(random), name
    longer = build(small("hybrid", repeat=3), seed=3)
    assert torch.equal(
        longer.get_parameter("layers.2.layer.qkv_proj.weight"),
        one.get_parameter("layers.2.layer.qkv_proj.weight"),
    )


def test_a_users_own_init_does_not_reach_a_trained_ssm() -> None:
    """`init_weights` is only ever called by constructors: loading a state dict is final."""
    model = build(small("mamba"), seed=1)
    other = build(small("mamba"), seed=2)
    other.load_state_dict(model.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_meta_parameters_are_left_alone() -> None:
    model = build(small("hybrid"), device="meta")
    init_weights(model)
    assert all(p.is_meta for p in model.parameters())
