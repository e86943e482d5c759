"""The head's cross-entropy of every backend on the CPU against torch's in float64, with its gradients."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.ops import BACKENDS, load, missing
from ssmoe.ops.reference.cross_entropy import IGNORE

ON_CPU = [name for name in BACKENDS if name != "triton" and not missing(name)]


def draw(tokens: int, d: int, vocab: int, *, bias: bool) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, d), (vocab, d)] + ([(vocab,)] if bias else [])
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[::3] = IGNORE
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes], targets


def run(function, inputs: list[Tensor], targets: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = function(*leaves, *([None] * (3 - len(leaves))), targets)
    (3 * loss).backward()
    return [loss.detach(), *(t.grad for t in leaves if t.grad is not None)]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    total = F.cross_entropy(F.linear(x, weight, bias), targets, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "d", "vocab"), [(1, 3, 5), (7, 5, 11), (20, 33, 65), (100, 64, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    bias: bool,
    tokens: int,
    d: int,
    vocab: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setitem(sys.modules["ssmoe.ops.reference.head_cross_entropy"].CHUNK, "cpu", 7)
    inputs, targets = draw(tokens, d, vocab, bias=bias)
    narrow = [t.to(dtype) for t in inputs]
    found = run(load(backend).head_cross_entropy, narrow, targets)
    expected = run(exact, [t.double() for t in narrow], targets)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * max(scale, 1e-30))
    assert [t.dtype for t in found[1:]] == [dtype] * len(inputs)
    with torch.no_grad():
        loss = load(backend).head_cross_entropy(*narrow, *([None] * (1 - bias)), targets)
    assert abs(float(loss) - float(expected[0])) <= tolerance * float(expected[0])


@pytest.mark.parametrize("backend", ON_CPU)
def test_float32_weights_under_bfloat16(backend: str) -> None:
    (x, weight), targets = draw(50, 16, 40, bias=False)
    expected = run(exact, [x, weight], targets)
    found = run(load(backend).head_cross_entropy, [x.bfloat16(), weight.float()], targets)
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.float32]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() < 0.05 * theirs.abs().max()


@pytest.mark.skipif("cpu" not in ON_CPU, reason="the CPU kernels were not built")
def test_many_rows_of_logits_are_cut() -> None:
    """More logits than the kernel keeps at a time: 900 rows of 60,000."""
    inputs, targets = draw(900, 4, 60_000, bias=False)
    narrow = [t.float() for t in inputs]
    found = run(load("cpu").head_cross_entropy, narrow, targets)
    expected = run(exact, [t.double() for t in narrow], targets)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("backend", ON_CPU)
def test_without_targets_it_is_zero(backend: str) -> None:
    loss, *gradients = run(
        load(backend).head_cross_entropy, [torch.randn(4, 3), torch.randn(5, 3)], torch.full((4,), IGNORE)
    )
    assert float(loss) == 0
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_logits_stay_finite(backend: str, value: float) -> None:
    x, weight = torch.full((3, 2), value), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [0.5, 0.5]])
    found = run(load(backend).head_cross_entropy, [x, weight], torch.tensor([0, 2, 1]))
    assert all(t.isfinite().all() for t in found)


# torch's own, from tracing any autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.skipif("cpu" not in ON_CPU, reason="the CPU kernels were not built")
def test_compiles_as_one_graph() -> None:
    """The definition does not: rows without a target are found by their number."""
    if not torch.ops.ssmoe.cpu_level().startswith("Avx512"):
        pytest.skip("composed of finer ops at this level")
    (x, weight), targets = draw(20, 8, 30, bias=False)
    function = load("cpu").head_cross_entropy
    leaf = weight.float().requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x.float(), leaf, None, targets), function(x.float(), leaf, None, targets)
    )
