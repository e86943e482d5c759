"""Parallel MoE-Mamba is the sum of its two parts."""

import torch

from ssmoe.model.feedforwards.moe import MoE
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.model.mixers.parallel import Parallel


def test_is_the_sum_of_mamba_and_moe_on_the_same_input() -> None:
    torch.manual_seed(0)
    mamba, moe = Mamba(8, d_state=3), MoE(8, num_experts=3, d_expert=5, capacity_factor=0.7)
    layer = Parallel(mamba, moe).train()
    x = torch.randn(2, 6, 8)
    out, mixed, routed = layer(x), mamba(x), moe(x)
    assert torch.equal(out.x, mixed.x + routed.x)
    assert torch.equal(out.state.ssm, mixed.state.ssm)
    assert torch.equal(out.stats.load, routed.stats.load)
    assert layer.batch_dependent
