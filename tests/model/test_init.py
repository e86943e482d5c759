"""The initialisation tables: statistics, and independence from device and order."""

from math import sqrt

import pytest
import torch

from ssmoe.config.model import InitConfig, MambaConfig, ModelConfig, MoEConfig
from ssmoe.model.build import build
from ssmoe.model.init import init_weights
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
