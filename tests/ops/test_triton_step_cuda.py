"""The CUDA C++ decode step on a CPU: `step_emulator.cpp` runs the same source, thread by thread, beside the reference."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU backend needs triton: pip install triton")

from ssmoe.ops import load
from ssmoe.ops.reference.mamba_step import Layer
from ssmoe.ops.triton import nvrtc, step_cuda
from tests.ops.step_cases import Case, inputs

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation is compiled with g++")
NAMES = (
    "norm_weight", "norm_bias", "in_proj", "conv_weight", "conv_bias", "x_proj", "delta_proj", "A_log", "D",
    "delta_bias", "out_proj",
)  # fmt: skip


class ORDER:
    """Whether the emulation runs the last thread first."""

    backwards = 0


@pytest.fixture(autouse=True, scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`nvrtc.launch` runs the kernel here."""
    folder, libraries = tmp_path_factory.mktemp("emulated"), {}

    def build(source: Path, macros: nvrtc.Macros) -> ctypes.CDLL:
        library = folder / f"{len(libraries)}.so"
        options = [f"-D{key}={value}" for key, value in macros]
        here = Path(__file__).with_name("step_emulator.cpp")
        flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f'-DSOURCE="{source}"']
        subprocess.run([str(COMPILER), *flags, *options, "-o", str(library), str(here)], check=True)
        return ctypes.CDLL(str(library))

    def launch(source: Path, kernel: str, macros: nvrtc.Macros, blocks: int, threads: int, words: list[int],
               shared: int, *, cluster: int, together: bool) -> None:  # fmt: skip
        assert (kernel, threads, cluster, together) == ("steps", 256, int(dict(macros)["CS"]), True)
        if macros not in libraries:
            libraries[macros] = build(source, macros)
        values = (ctypes.c_int64 * len(words))(*words)
        # the emulation refuses another size of shared memory than the source's
        assert libraries[macros].emulate(ctypes.c_long(blocks), values, ORDER.backwards, shared) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "launch", launch)
        yield


def split(given: dict[str, Any]) -> tuple[Tensor, Layer, Tensor, Tensor]:
    return given["x"], tuple(given[name] for name in NAMES), given["conv_state"], given["ssm_state"]


def run(given: list[dict[str, Any]], cut: step_cuda.Cut) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Through all layers by the kernels, the new states in new memory that nothing else has written."""
    layers, convs, ssms = (list(part) for part in list(zip(*map(split, given), strict=True))[1:])
    outs = [[torch.full_like(s, float("nan")) for s in states] for states in (convs, ssms)]
    y = step_cuda.steps(given[0]["x"], layers, cut, given[0]["norm_eps"], convs, ssms, *outs)
    return y, *outs


def judge(given: list[dict[str, Any]], cut: step_cuda.Cut) -> None:
    """Every output against float64, beside the reference in the same dtype."""
    found = run(given, cut)
    step = load("reference").mamba_step
    truth = eager = None
    for i, layer in enumerate(given):
        wide = {k: t.double() if isinstance(t, Tensor) else t for k, t in layer.items()}
        truth = step(**(wide | ({} if truth is None else {"x": truth[0]})))
        eager = step(**(layer | ({} if eager is None else {"x": eager[0]})))
        pairs = [(found[1][i], truth[1], eager[1]), (found[2][i], truth[2], eager[2])]
        if i == len(given) - 1:
            pairs.append((found[0], truth[0], eager[0]))
        for ours, exact, theirs in pairs:
            error = float((ours.double() - exact).norm() / exact.norm())
            bound = float((theirs.double() - exact).norm() / exact.norm())
            assert error <= 2 * bound + 1e-6, f"layer {i}: {error:.1e}, eager {bound:.1e}"


def case(b: int, d: int, c: int, taps: int, r: int, layers: int = 1) -> list[dict[str, Any]]:
    return [inputs(Case(b, d, c, 16, taps + 1, r), torch.bfloat16) for _ in range(layers)]


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize(
    ("b", "d", "c", "taps", "r", "blocks", "clusters"),
    [(1, 64, 128, 3, 8, 2, 2), (5, 128, 192, 3, 16, 2, 1), (19, 64, 128, 2, 40, 2, 2), (70, 64, 64, 1, 8, 2, 1)],
)
@torch.no_grad()
def test_parity(b: int, d: int, c: int, taps: int, r: int, blocks: int, clusters: int, backwards: int) -> None:
    ORDER.backwards = backwards
    cut = step_cuda.divided(step_cuda.Sizes(d, c, r, 16, taps), blocks, clusters)
    assert cut is not None
    judge(case(b, d, c, taps, r, layers=2), cut)
