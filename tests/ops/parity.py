"""How a backend is judged: by its error next to that of the eager reference, both against float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmoe.ops.segments import Segments

RATIO = 2.0
"""How many times eager torch's error a backend's may be."""
FLOOR = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-23, torch.float64: 1e-12}
"""Errors below this, relative to the result's norm, are rounding of one operation and not compared."""

Run = Callable[[Any, torch.dtype, torch.dtype], dict[str, Tensor]]


def judge(
    draw: Callable[[], Run], reference: Any, backend: Any, dtype: torch.dtype, repeats: int = 3
) -> None:
    """Draw inputs a few times, run both ops and assert the bound on the error of every result, pooled.

    A run takes (op, activation dtype, parameter dtype) and returns named results.
    """
    wide = torch.promote_types(dtype, torch.float32)
    sums: dict[str, list[float]] = {}
    seed = 0
    # few numbers are judged over more draws
    while seed < repeats or (sums and min(total[3] for total in sums.values()) < 40):
        torch.manual_seed(seed)
        seed += 1
        run = draw()
        exact = run(reference, torch.float64, torch.float64)
        eager, found = run(reference, dtype, wide), run(backend, dtype, wide)
        for name, true in exact.items():
            assert found[name].dtype == eager[name].dtype, name
            assert found[name].isfinite().all(), name
            norms = [(t.double() - true).square().sum().item() for t in (found[name], eager[name])]
            total = sums.setdefault(name, [0.0] * 4)
            for i, value in enumerate([*norms, true.square().sum().item()]):
                total[i] += value
            total[3] += true.numel()
    for name, (found, eager, size, _) in sums.items():
        allowed = RATIO * max(eager**0.5, FLOOR[dtype] * size**0.5)
        assert found**0.5 <= allowed, (
            f"{name}: error {found**0.5 / (size**0.5 or 1):.2e}, eager {eager**0.5 / (size**0.5 or 1):.2e}"
        )


def documents(b: int, l: int, seed: int = 0) -> Segments:
    """Rows of several documents with padding in front, at the end and inside; some continue the state."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(b, l, generator=generator) < 0.1
    ids = starts.cumsum(1).to(torch.int32)
    if l > 4:
        for row in range(b):
            ids[row, :row] = -1
            ids[row, l - 1 - row :] = -1
            ids[row, l // 2] = -1
    return Segments(ids, starts)


def leaf(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A copy that collects its gradient."""
    return None if t is None else t.to(dtype, copy=True).requires_grad_()


def results(
    outputs: dict[str, Tensor], gradients: dict[str, Tensor], inputs: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """Outputs and the gradient of every input that has one, after backward from `gradients`."""
    torch.autograd.backward(
        [outputs[n] for n in gradients], [g.to(outputs[n].dtype) for n, g in gradients.items()]
    )
    found = {name: value.detach() for name, value in outputs.items()}
    return found | {f"d{n}": t.grad for n, t in inputs.items() if t is not None and t.grad is not None}


def rounded(*shape: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers that `dtype` holds exactly, in float64."""
    return torch.randn(*shape).to(dtype).double()
