"""AdamW's kernel against the definition: in the interpreter, and (`-m gpu`) on a GPU."""

import pytest
import torch

from ssmoe.ops.reference.adamw_step import adamw_step as definition
from tests.ops.test_triton_interpreter import interpreted

EXACT = """
from tests.ops.test_triton_adamw_step import errors
for held in (False, True):
    for scaled in (False, True):
        for narrow in (False, True):
            print(*errors(held, scaled, "cpu", narrow=narrow))
"""


def errors(held: bool, scaled: bool, device: str, *, narrow: bool = False) -> list[float]:
    """Relative errors of moves and both states after five updates: the kernel's, then float32 torch's.

    narrow: of bfloat16 gradients.
    """
    from ssmoe.ops.triton.adamw_step import adamw_step

    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 33), (1,), (3, 700)]
    start = [torch.randn(shape, generator=generator) * 1e-2 for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) * 1e-3 for shape in shapes] for _ in range(5)]
    if narrow:
        gradients = [[t.bfloat16() for t in now] for now in gradients]
    results: list[list[torch.Tensor]] = []
    for run, kind in ((adamw_step, torch.float32), (definition, torch.float32), (definition, torch.float64)):
        parameters = [t.to(device, kind, copy=True) for t in start]
        means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        steps = [torch.zeros((), device=device) for _ in parameters]
        for now in gradients:
            torch._foreach_add_(steps, 1)
            run(
                parameters,
                [t.to(device) if narrow and run is adamw_step else t.to(device, kind) for t in now],
                means,
                squares,
                steps,
                rate=torch.tensor(1e-3, dtype=kind, device=device) if held else 1e-3,
                betas=(0.9, 0.999),
                eps=1e-8,
                decay=0.1,
                scale=torch.tensor(2.0, dtype=kind, device=device) if scaled else None,
            )
        moved = [p.cpu().double() - t.double() for p, t in zip(parameters, start, strict=True)]
        results.append(
            [torch.cat([t.cpu().double().flatten() for t in ts]) for ts in (moved, means, squares)]
        )
    ours, eager, truth = results
    return [
        float((a - b).norm() / b.norm()) for found in (ours, eager) for a, b in zip(found, truth, strict=True)
    ]


def within_twice_eager(found: list[float]) -> None:
    for ours, eager in zip(found[:3], found[3:], strict=True):
        assert ours <= 2 * eager + 5e-7, found


@pytest.mark.slow
def test_kernel_in_the_interpreter_equals_the_definition() -> None:
    pytest.importorskip("triton", reason="the Triton interpreter needs triton: pip install triton")
    lines = interpreted("-c", EXACT).splitlines()
    assert len(lines) == 8
    for line in lines:
        within_twice_eager([float(word) for word in line.split()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_kernel_on_a_gpu_equals_the_definition(held: bool, scaled: bool, narrow: bool) -> None:
    within_twice_eager(errors(held, scaled, "cuda", narrow=narrow))
