"""The mixture of experts as a module of its own."""

import pytest
import torch
import torch.nn.functional as F

import ssmoe
from ssmoe.model.feedforwards.moe import MoE


def test_is_public_and_defaults_to_four_times_the_width() -> None:
    block = ssmoe.MoE(8, num_experts=3)
    assert block.experts.up.shape == (3, 32, 8)
    out = block(torch.randn(2, 5, 8))
    assert out.x.shape == (2, 5, 8)
    assert out.state == ()


def test_all_experts_with_equal_gates_are_the_mean_of_dense_networks() -> None:
    torch.manual_seed(0)
    block = MoE(6, num_experts=4, d_expert=5, top_k=4).double()
    with torch.no_grad():
        block.router.weight.zero_()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    up, down = block.experts.up, block.experts.down
    dense = torch.stack([F.relu(x @ up[e].T) @ down[e].T for e in range(4)]).mean(0)
    torch.testing.assert_close(block(x).x, dense)


def test_a_dropped_token_gives_zero() -> None:
    torch.manual_seed(0)
    block = MoE(6, num_experts=4, d_expert=5, capacity_factor=0.5).train()
    out = block(torch.randn(4, 8, 6))
    zero = (out.x == 0).all(-1)
    assert out.stats is not None
    assert int(zero.sum()) == int(out.stats.dropped) > 0


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_experts_without_a_token_get_zero_gradients(num_tokens: int) -> None:
    block = MoE(6, num_experts=4, d_expert=5, activation="swiglu").double()
    out = block(torch.randn(1, num_tokens, 6, dtype=torch.float64))
    out.x.sum().backward()
    assert out.stats is not None
    idle = out.stats.load == 0
    assert idle.any()
    for bank in (block.experts.up, block.experts.gate, block.experts.down):
        assert bank is not None
        assert bank.grad is not None
        assert torch.isfinite(bank.grad).all()
        assert not bank.grad[idle].any()
        assert bank.grad[~idle].any()


def test_batch_dependence_is_declared() -> None:
    assert MoE(4, num_experts=2, capacity_factor=1.0).batch_dependent
    assert not MoE(4, num_experts=2).batch_dependent


def test_too_many_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k=3 is more than num_experts=2"):
        MoE(4, num_experts=2, top_k=3)
