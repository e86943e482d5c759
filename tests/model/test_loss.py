"""The sum of the head's and the routers' losses."""

import torch

from ssmoe.model.layer import RouterStats
from ssmoe.model.loss import model_loss
from ssmoe.ops.reference.cross_entropy import IGNORE


def test_all_ignored_is_zero() -> None:
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    loss = model_loss(x.view(1, 4, 3), weight, None, torch.full((1, 4), IGNORE), [])
    assert float(loss.lm.detach()) == 0
    assert int(loss.tokens) == 0
    loss.total.backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_the_routers_losses_are_added_up() -> None:
    def stats(balance: float, z: float) -> RouterStats:
        none = torch.zeros(())
        return RouterStats(torch.tensor(balance), torch.tensor(z), none, none, none, none)

    x, weight, targets = torch.randn(1, 4, 3), torch.randn(5, 3), torch.tensor([[0, 4, 2, 1]])
    alone = model_loss(x, weight, None, targets, [])
    both = model_loss(x, weight, None, targets, [stats(0.5, 0.125), stats(2.0, 1.0)])
    assert (float(alone.balance), float(alone.z)) == (0, 0)
    assert (float(both.balance), float(both.z)) == (2.5, 1.125)
    assert float(both.lm) == float(alone.total)
    torch.testing.assert_close(both.total, alone.total + 3.625)
