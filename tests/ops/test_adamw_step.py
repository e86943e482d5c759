"""AdamW's update against torch's own."""

import pytest
import torch

from ssmoe.ops import load, missing


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_torch(backend: str, held: bool) -> None:
    if backend == "cpu" and (reason := missing("cpu")):
        pytest.skip(reason)
    torch.manual_seed(0)
    start = [torch.randn(7, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    theirs = [p.clone().requires_grad_() for p in start]
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    torch_own = torch.optim.AdamW(theirs, **options)
    ours = [p.clone() for p in start]
    means, squares = ([torch.zeros_like(p) for p in start] for _ in range(2))
    steps = [torch.zeros(()) for _ in start]
    for _ in range(4):
        gradients = [torch.randn_like(p) for p in start]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        torch_own.step()
        torch._foreach_add_(steps, 1)
        load(backend).adamw_step(
            ours,
            [gradient * 3 for gradient in gradients],
            means,
            squares,
            steps,
            rate=torch.tensor(0.01, dtype=torch.float64) if held else 0.01,
            betas=(0.8, 0.95),
            eps=1e-6,
            decay=0.3,
            scale=torch.tensor(3.0, dtype=torch.float64),
        )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach())
