"""The definition against torch's own loss and autograd."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from ssmoe.ops.reference.cross_entropy import IGNORE, cross_entropy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(20, 11).to(dtype), torch.randint(11, (20,))
    targets[::3] = IGNORE
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=IGNORE, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    alone, nothing = cross_entropy(logits, targets, gradient=False)
    loss, gradient = cross_entropy(logits.clone(), targets, gradient=True)
    assert nothing is None
    assert torch.equal(alone, loss)
    assert gradient is not None
    assert gradient.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(loss.double(), expected.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient.double(), slope, atol=tolerance, rtol=tolerance)


def test_nothing_to_predict_is_zero() -> None:
    loss, gradient = cross_entropy(torch.randn(3, 5), torch.full((3,), IGNORE), gradient=True)
    assert gradient is not None
    assert not loss.any()
    assert not gradient.any()


def test_the_triton_one_has_the_same_signature() -> None:
    kernels = pytest.importorskip("ssmoe.ops.triton.cross_entropy", reason="needs triton")
    assert inspect.signature(kernels.cross_entropy) == inspect.signature(cross_entropy)
