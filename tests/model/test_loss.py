"""The sum of the head's and the routers' losses."""

import torch

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
