"""Muon's kernels against the definition: in the interpreter, and (`-m gpu`) on a GPU."""

import pytest
import torch

from ssmoe.ops.reference.muon_step import muon_step as definition
from ssmoe.ops.reference.muon_step import orthogonalise
from ssmoe.training.muon import JORDAN, POLAR
from tests.ops.test_triton_interpreter import interpreted

SHAPES = [((2,), 40, 56), ((3, 1), 56, 40), ((1,), 130, 150), ((1, 2), 1, 9), ((2,), 129, 129)]
LARGE = [((16,), 384, 512), ((16,), 512, 384), ((8,), 128, 512), ((2, 2), 1024, 512)]
EXACT = """
import torch
import sys
import ssmoe.ops.triton.muon_step
from tests.ops.test_triton_muon_step import SHAPES, errors

sys.modules["ssmoe.ops.triton.muon_step"].DTYPE = torch.float32
for shape in SHAPES:
    for held in (False, True):
        print(shape, held, *errors(*shape, held, "cpu", torch.float32))
"""


def errors(sizes, rows, columns, held, device, dtype):
    """Relative errors to float64: the kernels' update and momentum, eager products in `dtype`."""
    from ssmoe.ops.triton.muon_step import muon_step

    generator, found = torch.Generator().manual_seed(0), []
    start = [torch.randn(n, rows, columns, generator=generator) * 1e-2 for n in sizes]
    gradients = [torch.randn(p.shape, generator=generator) * 1e-3 for p in start]
    momenta = [torch.randn(p.shape, generator=generator) * 1e-3 for p in start]
    for iteration in (JORDAN, POLAR):
        results = []
        for run, kind in ((muon_step, torch.float32), (definition, torch.float64)):
            p, g, m = ([t.to(device, kind, copy=True) for t in ts] for ts in (start, gradients, momenta))
            rate = torch.tensor(0.02, dtype=kind, device=device) if held else 0.02
            run(p, g, m, rate=rate, decay=0.1, mu=0.95, iteration=iteration)
            moved = [(a.cpu().double() - b.double()) for a, b in zip(p, start, strict=True)]
            results.append((moved, [t.cpu().double() for t in m]))
        (ours, mine), (exact, theirs) = results
        found.append(max(_error(a, b) for a, b in zip(ours, exact, strict=True)))
        found.append(max(_error(a, b) for a, b in zip(mine, theirs, strict=True)))
        narrow = orthogonalise(gradients[0].to(device, dtype), iteration)
        wide = orthogonalise(gradients[0].to(device, torch.float64), iteration)
        found.append(_error(narrow, wide))
    return found


def _error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.slow
def test_kernels_in_the_interpreter_equal_the_definition():
    pytest.importorskip("triton", reason="the Triton interpreter needs triton: pip install triton")
    lines = interpreted("-c", EXACT).splitlines()
    assert len(lines) == 2 * len(SHAPES)
    for line in lines:
        found = [float(word) for word in line.split()[-6:]]
        for update, momentum, eager in (found[:3], found[3:]):
            assert update <= 2 * eager + 2e-6, line
            assert momentum <= 1e-6, line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("held", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_kernels_are_as_good_as_torchs_products(shape, held):
    """Twice the error of the definition in bfloat16, as for every kernel."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    found = errors(*shape, held, "cuda", torch.bfloat16)
    for update, momentum, eager in (found[:3], found[3:]):
        assert update <= 2 * eager + 2e-3
        assert momentum <= 1e-6
