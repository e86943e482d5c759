import pytest
import torch

from ssmoe.ops import load
from ssmoe.training import adamw
from ssmoe.training.adamw import AdamW


def _pair(device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(40, 30, generator=generator), torch.randn(7, generator=generator)]
    ours, theirs = ([t.to(device, copy=True).requires_grad_() for t in start] for _ in range(2))
    return ours, theirs


@pytest.mark.parametrize("large", [1, 100, 10_000], ids=["all ours", "one ours", "all torch's"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
def test_equals_torch(device: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "LARGE", large)
    if device == "cpu":
        monkeypatch.setattr(adamw, "is_large", lambda p: p.numel() >= large)
    ours, theirs = _pair(device)
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    update = load("auto", device).adamw_step
    mine = AdamW([{"params": ours, "weight_decay": 0.3}], update=update, **options)
    reference = torch.optim.AdamW(theirs, weight_decay=0.3, fused=True, **options)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, device=device)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
        assert all(p.grad is not None for p in ours)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert mine.state[a].keys() == reference.state[b].keys()
        for key, value in reference.state[b].items():
            torch.testing.assert_close(mine.state[a][key], value)


def test_every_update_is_a_new_version(monkeypatch: pytest.MonkeyPatch) -> None:
    # the first is ours, the other torch's
    monkeypatch.setattr(adamw, "is_large", lambda p: p.numel() > 100)
    ours, _ = _pair("cpu")
    mine = AdamW([{"params": ours}], lr=0.1, betas=(0.9, 0.99), eps=1e-8, update=lambda *_, **__: None)
    for parameter in ours:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter._version for parameter in ours]
    mine.step()
    assert all(p._version > v for p, v in zip(ours, before, strict=True))
