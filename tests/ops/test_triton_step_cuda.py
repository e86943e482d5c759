"""The CUDA C++ decode step on a CPU: `step_emulator.cpp` runs the source, by thread, beside the reference."""

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU backend needs triton: pip install triton")

from ssmoe.ops.triton import nvrtc, step_cuda
from ssmoe.ops.triton.step_cuda import Sizes
from tests.ops.emulate import COMPILER, build
from tests.ops.step_cases import Case, Steps, chain_errors, in_turn, inputs

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation is compiled with g++")
MEMORY = 227 * 1024
"""Bytes of shared memory that a block of an H200 can be given."""


class ORDER:
    """Whether the emulation runs the last thread first."""

    backwards = 0


@pytest.fixture(autouse=True, scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`nvrtc.launch` runs the kernel here."""
    folder = tmp_path_factory.mktemp("emulated")

    @cache
    def library(source: Path, macros: nvrtc.Macros) -> ctypes.CDLL:
        return build("step_emulator.cpp", source, macros, folder / f"{abs(hash(macros))}.so")

    def launch(source: Path, kernel: str, macros: nvrtc.Macros, blocks: int, threads: int, words: list[int],
               shared: int, *, together: bool = False) -> None:  # fmt: skip
        assert (kernel, threads, together) == ("steps", step_cuda.THREADS, True)
        values = (ctypes.c_int64 * len(words))(*words)
        # the emulation refuses another size of shared memory than the source's
        assert library(source, macros).emulate(ctypes.c_long(blocks), values, ORDER.backwards, shared) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "launch", launch)
        yield


def by_kernel(stages: int = 3, processors: int = 8) -> Steps:
    """`mamba_steps` by the kernel on a GPU of so many multiprocessors, with so many stages of weights."""

    def steps(x: Tensor, layers: Any, *, norm_eps: float, **states: Any) -> Any:
        outs = states["out_convs"], states["out_ssms"]
        bias = layers[0][1] is not None
        cut = step_cuda.cut(step_cuda.sizes_of(layers[0]), x.shape[0], bias, processors, MEMORY)
        assert cut is not None
        kept = states["conv_states"], states["ssm_states"]
        y = step_cuda.steps(x, layers, cut._replace(stages=stages), norm_eps, *kept, *outs)
        return y, *outs

    return steps


def case(b: int, sizes: Sizes, layers: int = 2, *, bias: bool = False) -> list[dict[str, Any]]:
    d, c, r, n, taps = sizes
    return [inputs(Case(b, d, c, n, taps + 1, r), torch.bfloat16, bias=bias) for _ in range(layers)]


def judge(given: list[dict[str, Any]], steps: Steps) -> None:
    for i, (ours, eager) in enumerate(chain_errors(given, steps)):
        assert ours <= 2 * eager + 1e-6, f"output {i}: {ours:.1e}, eager {eager:.1e}"


SMALL = Sizes(256, 256, 16, 16, 3)


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize(
    ("b", "sizes", "stages", "bias"),
    [
        (1, SMALL, 2, False),
        (2, Sizes(512, 256, 24, 16, 3), 1, True),
        (4, Sizes(256, 512, 16, 16, 2), 4, False),
        (3, Sizes(256, 512, 8, 16, 1), 64, True),
    ],
)
def test_parity(b: int, sizes: Sizes, stages: int, bias: bool, backwards: int) -> None:
    ORDER.backwards = backwards
    judge(case(b, sizes, 3, bias=bias), by_kernel(stages, 12))


def test_parity_of_a_residual_stream_in_bfloat16() -> None:
    given = case(2, SMALL)
    given[0]["x"] = given[0]["x"].bfloat16()
    judge(given, by_kernel())


@torch.no_grad()
def test_a_row_has_the_same_bits_among_any_others() -> None:
    given = case(4, SMALL)
    together = in_turn(given, by_kernel())
    for some in (1, 2, 3):
        names = ("x", "conv_state", "ssm_state")
        rows = [layer | {name: layer[name][4 - some :].contiguous() for name in names} for layer in given]
        for all_rows, own in zip(together, in_turn(rows, by_kernel()), strict=True):
            assert torch.equal(all_rows[4 - some :], own)


@torch.no_grad()
def test_more_layers_than_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(1, SMALL, 3)
    once = in_turn(given, by_kernel())
    monkeypatch.setattr(step_cuda, "MOST_LAYERS", 2)
    for one, two in zip(once, in_turn(given, by_kernel()), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("d", [512, 768, 1024, 1536, 2048, 2560])
def test_the_presets_fit_an_h200(d: int, rows: int) -> None:
    sizes = Sizes(d, 2 * d, d // 16, 16, 3)
    found = step_cuda.cut(sizes, rows, True, 132, MEMORY)
    assert found is not None
    assert found.blocks == 128
    assert step_cuda.shared_bytes(sizes, found, rows, True) <= MEMORY
    assert step_cuda.shared_bytes(sizes, found._replace(stages=found.stages + 1), rows, True) > MEMORY


@pytest.mark.parametrize(
    "sizes",
    [
        (768, 1536, 48, 32, 3),  # states
        (768, 1536, 44, 16, 3),  # delta's width is not whole vectors
        (768, 1536, 48, 16, 0),  # no convolution
        (520, 1040, 33, 16, 3),
        (96, 192, 8, 16, 3),
        (8192, 16384, 512, 16, 3),  # channels of a block
    ],
)
def test_sizes_that_do_not_divide(sizes: tuple[int, ...]) -> None:
    assert step_cuda.cut(Sizes(*sizes), 1, False, 132, MEMORY) is None


def test_a_cpu_is_left_to_others() -> None:
    given = case(1, SMALL, 1)[0]
    assert not step_cuda.takes(given["x"], [], [given["conv_state"]], [given["ssm_state"]])
