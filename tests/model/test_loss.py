"""The head's cross-entropy against torch's, with its gradients, across chunk edges."""

import pytest
import torch
import torch.nn.functional as F

from ssmoe.model import loss as module
from ssmoe.model.loss import head_cross_entropy
from ssmoe.ops.reference.cross_entropy import IGNORE


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 8, 20])
def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch, tokens: int, with_bias: bool) -> None:
    monkeypatch.setitem(module._CHUNK, "cpu", 7)
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (tokens, 11))
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.randint(11, (tokens,))
    targets[::3] = IGNORE
    inputs = [x, weight] if bias is None else [x, weight, bias]
    expected = F.cross_entropy(F.linear(x, weight, bias), targets, ignore_index=IGNORE, reduction="sum")
    found = head_cross_entropy(x, weight, bias, targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs)
    )
    with torch.no_grad():
        torch.testing.assert_close(head_cross_entropy(x, weight, bias, targets), expected)


def test_all_ignored_is_zero() -> None:
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    loss = module.model_loss(x.view(1, 4, 3), weight, None, torch.full((1, 4), IGNORE), [])
    assert float(loss.lm.detach()) == 0
    assert int(loss.tokens) == 0
    loss.total.backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_bfloat16_gradients_are_close() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(50, 16), torch.randn(40, 16)
    targets = torch.randint(40, (50,))
    exact = [t.double().requires_grad_() for t in (x, weight)]
    F.cross_entropy(F.linear(*exact), targets, reduction="sum").backward()
    narrow = [x.bfloat16().requires_grad_(), weight.clone().requires_grad_()]
    head_cross_entropy(narrow[0], narrow[1], None, targets).backward()
    for a, b in zip(narrow, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == a.dtype
        assert (a.grad.double() - b.grad).abs().max() < 0.05 * b.grad.abs().max()
