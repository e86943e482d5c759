"""Sums over programs, several tensors a launch: in the interpreter, and (`-m gpu`) on a GPU."""

import pytest
import torch
from torch import Tensor

from tests.ops.test_triton_interpreter import interpreted

SHAPES = [[(3, 5)], [(1, 17, 2), (700, 33)], [(64, 40, 16), (64, 40), (64, 40)], [(0,), (9, 20)], [(0,)]]
RUN = """
from tests.ops.test_triton_column_sums import SHAPES, check
for shapes in SHAPES:
    check(shapes, "cpu")
"""


def check(shapes: list[tuple[int, ...]], device: str) -> None:
    """Every sum against float64, twice the same bits, in the dtype that was asked for."""
    from ssmoe.ops.triton.column_sums import column_sums

    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    dtypes = [torch.float32, torch.bfloat16, torch.float32]

    def run() -> list[Tensor]:
        return column_sums(*zip(parts, dtypes, strict=False))

    for part, found, again, dtype in zip(parts, run(), run(), dtypes, strict=False):
        assert found.dtype == dtype
        assert torch.equal(found, again)
        exact = part.double().sum(0) if part.numel() else part.double()
        assert found.shape == exact.shape
        # float32: eight of its steps; the interpreter truncates to bfloat16
        step = 2**-20 if dtype == torch.float32 else 2**-7
        bound = step * (part.double().abs().sum(0) if part.numel() else exact)
        assert bool(((found.double() - exact).abs() <= bound).all())


def test_interpreted() -> None:
    pytest.importorskip("triton", reason="the Triton interpreter needs triton: pip install triton")
    interpreted("-c", RUN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shapes", [*SHAPES, [(2112, 1, 512)], [(1024, 1024, 4), (1024, 1024)]])
def test_on_a_gpu(shapes: list[tuple[int, ...]]) -> None:
    check(shapes, "cuda")
