"""The CUDA C++ cross-entropy on a CPU: `cluster_emulator.cpp` runs the same source beside the reference."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU backend needs triton: pip install triton")

from ssmoe.ops.reference.cross_entropy import IGNORE, cross_entropy
from ssmoe.ops.triton import cross_entropy_cuda as cuda
from ssmoe.ops.triton import nvrtc
from tests.ops.emulate import COMPILER, build

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation is compiled with g++")
Run = Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor, Tensor]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """(losses, gradient, its sums by column) of logits by the emulated kernel."""

    def launch(
        source: Path,
        kernel: str,
        macros: nvrtc.Macros,
        blocks: int,
        threads: int,
        words: list[int],
        shared: int = 0,
    ) -> None:
        assert (kernel, threads, shared > 0) == ("cross_entropy", cuda.THREADS, True)
        values = (ctypes.c_int64 * len(words))(*words)
        library = build("cluster_emulator.cpp", source, macros, tmp_path / "emulated.so")
        library.emulate(ctypes.c_long(blocks), values, ctypes.c_int(backwards[0]))

    def two(device: torch.device) -> int:
        return 2 if device.type == "cpu" else 0

    backwards = [False]
    monkeypatch.setattr(nvrtc, "launch", launch)
    monkeypatch.setattr(cuda, "clusters", two)

    def emulated(
        logits: Tensor, targets: Tensor, vocab: int, last_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        backwards[0] = last_first
        logits, loss = logits.clone(), torch.full((logits.shape[0],), float("nan"))
        sums = torch.zeros(2, logits.shape[1])
        cuda.overwrite(logits, targets, loss, vocab, sums)
        return loss, logits, sums.sum(0)

    return emulated


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize(("width", "vocab"), [(8192, 8190), (16448, 16385), (50304, 50257)])
def test_equals_the_reference(run: Run, width: int, vocab: int, last_first: bool) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, width) * 3).bfloat16()
    targets = torch.randint(6, vocab, (5,))
    targets[1], targets[3] = vocab - 1, IGNORE
    logits[0, targets[0]] = 40.0
    logits[:, 5] = float("-inf")
    logits[2, vocab - 3 :] = 95.0
    logits[:, vocab:] = 300.0
    exact = cross_entropy(logits[:, :vocab].double(), targets, gradient=True)
    eager = cross_entropy(logits[:, :vocab].clone(), targets, gradient=True)
    loss, gradient, sums = run(logits, targets, vocab, last_first)
    assert not gradient[:, vocab:].any()
    for found, truth, theirs in zip((loss, gradient[:, :vocab]), exact, eager, strict=True):
        assert truth is not None
        assert theirs is not None
        assert _error(found, truth) <= 2 * _error(theirs, truth) + 5e-7
    assert exact[1] is not None
    assert _error(sums[:vocab], exact[1].sum(0)) < 1e-6


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def test_what_it_takes() -> None:
    assert not cuda.covers(torch.zeros(3, 16384, dtype=torch.bfloat16))
