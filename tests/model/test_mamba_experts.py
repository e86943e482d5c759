"""Experts inside the Mamba block: degenerate cases equal the plain mixer, routers are separate or shared."""

from itertools import chain, combinations

import pytest
import torch

from ssmoe.config.model import MambaConfig, MambaExpertsConfig, ModelConfig, Projection
from ssmoe.model.build import build
from ssmoe.model.feedforwards.router import Router, rebalance
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.model.mixers.mamba_experts import LinearExperts, MambaExperts

NAMES: tuple[Projection, ...] = ("conv", "gate", "out")
COMBINATIONS = list(chain.from_iterable(combinations(NAMES, n) for n in (1, 2, 3)))


def make(**options: object) -> MambaExperts:
    layer = MambaExpertsConfig.model_validate({"num_experts": 3, "d_expert": 6, **options})
    model = build(ModelConfig(vocab_size=5, d_model=8, pattern=(layer,)), seed=2).double()
    mixer = model.layers[0].get_submodule("layer")
    assert isinstance(mixer, MambaExperts)
    return mixer


@pytest.mark.parametrize("routing", ["separate", "shared"])
@pytest.mark.parametrize("projections", COMBINATIONS)
def test_one_linear_expert_of_weight_one_is_the_plain_mixer(
    projections: tuple[Projection, ...], routing: str
) -> None:
    layer = make(projections=projections, num_experts=1, expert="linear", routing=routing)
    plain = Mamba(8).double()
    weights = plain.state_dict()
    conv, gate = weights.pop("in_proj.weight").chunk(2)
    for name, value in (("conv", conv), ("gate", gate), ("out", weights.pop("out_proj.weight"))):
        weights[f"{name}_proj.weight"] = value.unsqueeze(0) if name in projections else value
    # softmax over a single expert is one
    weights |= {k: v for k, v in layer.state_dict().items() if k.startswith("routers.")}
    layer.load_state_dict(weights)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x).x, plain(x).x)


@pytest.mark.parametrize("projections", COMBINATIONS)
def test_separate_routers_decide_alone_and_are_balanced_alone(projections: tuple[Projection, ...]) -> None:
    layer = make(projections=projections, balance="bias")
    stats = layer(torch.randn(2, 9, 8, dtype=torch.float64)).stats
    r = len(projections)
    assert stats.load.shape == ((r, 3) if r > 1 else (3,))
    assert stats.load.reshape(-1, 3).sum(1).tolist() == [18] * r
    load = torch.tensor([[9, 6, 3], [3, 9, 6], [6, 3, 9]])[:r]
    rebalance(layer, load if r > 1 else load[0])
    routers = [module for module in layer.modules() if isinstance(module, Router)]
    for router, counts in zip(routers, load, strict=True):
        assert router.bias is not None
        assert router.bias.sign().tolist() == (counts.double().mean() - counts).sign().tolist()


def test_losses_of_several_routers_add_up_and_their_confidence_is_the_mean() -> None:
    layer, alone = make(z_coefficient=0.1, balance_coefficient=1.0), []
    for router in layer.routers.values():
        router.register_forward_hook(lambda module, arguments, routing: alone.append(routing.stats))
    stats = layer(torch.randn(2, 9, 8, dtype=torch.float64)).stats
    assert len(alone) == 3
    for name in ("balance", "z"):
        torch.testing.assert_close(getattr(stats, name), sum(getattr(one, name) for one in alone))
    for name in ("confidence", "entropy"):
        torch.testing.assert_close(getattr(stats, name), sum(getattr(one, name) for one in alone) / 3)


def test_the_routers_read_what_their_projection_reads() -> None:
    shapes = {name: tuple(router.weight.shape) for name, router in make().routers.items()}
    assert shapes == {"for_conv": (3, 8), "for_gate": (3, 8), "for_out": (3, 16)}
    assert {name: tuple(r.weight.shape) for name, r in make(routing="shared").routers.items()} == {
        "shared": (3, 8)
    }


def test_a_shared_decision_sends_a_token_to_the_same_expert_everywhere() -> None:
    """Expert e's banks are e's alone: zeroing those of the others changes nothing for e's tokens."""
    layer = make(expert="linear", routing="shared")
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    before = layer(x)
    e = int(before.stats.load.argmax())
    with torch.no_grad():
        for bank in (layer.conv_proj, layer.gate_proj, layer.out_proj):
            assert isinstance(bank, LinearExperts)
            keep = bank.weight[e].clone()
            bank.weight.zero_()
            bank.weight[e] = keep
    torch.testing.assert_close(layer(x).x, before.x, rtol=0, atol=0)


def test_a_shared_decision_weighs_once() -> None:
    """Routing weights reach the output projection; without experts there, the others."""
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    for projections, where in ((NAMES, "out"), (("conv",), "conv")):
        layer = make(projections=projections, expert="linear", routing="shared", weight_scale=3.0)
        one = make(projections=projections, expert="linear", routing="shared")
        seen = layer(x).x, one(x).x
        if where == "out":
            torch.testing.assert_close(seen[0], 3 * seen[1])
        else:
            assert not torch.allclose(seen[0], seen[1])


def test_naming_a_projection_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="name each once"):
        MambaExpertsConfig(num_experts=2, projections=("conv", "conv"))


def test_every_other_layer_is_a_pattern() -> None:
    inner = MambaExpertsConfig(num_experts=2)
    config = ModelConfig(vocab_size=5, d_model=8, pattern=(MambaConfig(), inner), repeat=2)
    assert [layer.kind for layer in config.layers] == ["mamba", "mamba_experts"] * 2
