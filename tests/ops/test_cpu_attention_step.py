"""One token's attention by the C++ kernels against float64, at every level that this machine has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmoe.ops import load, missing
from tests.ops.attention_cases import errors

pytestmark = pytest.mark.skipif(bool(missing("cpu")), reason=str(missing("cpu")))
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(1, 1, 70, 4), (3, 2, 1700, 64), (5, 2, 333, 17), (2, 3, 40, 130)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("rope_base", [None, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape: tuple[int, int, int, int], dtype: torch.dtype, rope_base: float | None) -> None:
    if rope_base and shape[3] % 2:
        pytest.skip("rotation turns pairs")
    for name, (ours, eager) in errors(*shape, dtype, rope_base, backend="cpu").items():
        assert ours <= 2 * eager + (1e-12 if dtype == torch.float64 else 5e-7), (
            f"{name}: {ours:.1e}, {eager:.1e}"
        )


LEVEL = """
import json
import torch
from tests.ops.attention_cases import errors
kinds = torch.float32, torch.bfloat16
print(json.dumps([errors(3, 2, 600, 20, dtype, 1e4, backend="cpu") for dtype in kinds]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_every_level(level: str) -> None:
    environment = os.environ | {"SSMOE_CPU_LEVEL": level, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LEVEL], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    for found in json.loads(done.stdout):
        assert found
        for name, (ours, eager) in found.items():
            assert ours <= 2 * eager + 5e-7, f"{name}: {ours:.1e}, {eager:.1e}"


def test_what_the_kernel_does_not_take_is_named() -> None:
    step = load("cpu").attention_step
    cache, length = torch.zeros(1, 2, 8, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        step(torch.zeros(1, 24), torch.zeros(1, 2, 8, 8)[..., ::2], cache, length, rope_base=None)
    with pytest.raises(ValueError, match="holds 8 tokens and 8 are in use"):
        step(torch.zeros(1, 24), cache, cache.clone(), torch.tensor([8]), rope_base=None)
