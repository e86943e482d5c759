"""The greedy choice of the Triton backend: in the interpreter on a CPU, and on a GPU."""

import pytest
import torch

from tests.ops.test_triton_interpreter import interpreted

CASES = """
import torch
from ssmoe.ops.triton.argmax import argmax

def check(device):
    for b, n in ((1, 1), (3, 5), (2, 2048), (5, 50280), (64, 4097)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(b, n + 3, device=device).to(dtype)[:, :n]
            for _ in range(2):
                found = argmax(x)
                assert found.dtype == torch.int64
                for row, i in zip(x, found.tolist()):
                    # of equal numbers the first
                    assert i == int((row == row.max()).nonzero()[0])
    tie = torch.tensor([[-1.0, 2.0, 2.0], [-0.0, 0.0, -1.0], [-float("inf")] * 3, [1.0, float("nan"), 3.0]])
    assert argmax(tie.to(device)).tolist() == [1, 0, 0, 1]
"""


@pytest.mark.slow
def test_the_first_largest() -> None:
    pytest.importorskip("triton", reason="the Triton interpreter needs triton: pip install triton")
    interpreted("-c", CASES + "check('cpu')\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_first_largest_on_a_gpu() -> None:
    space: dict[str, object] = {}
    exec(CASES, space)
    space["check"]("cuda")  # pyright: ignore


def test_what_is_refused() -> None:
    argmax = pytest.importorskip("ssmoe.ops.triton.argmax", reason="needs triton: pip install triton").argmax
    with pytest.raises(ValueError, match="x has 0 columns"):
        argmax(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        argmax(torch.zeros(2, 3, dtype=torch.float64))
