"""The CUDA C++ decode step on a CPU: `step_emulator.cpp` runs the same source, thread by thread, beside the reference."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU backend needs triton: pip install triton")

from ssmoe.ops.reference.linear import linear
from ssmoe.ops.triton import nvrtc, step_cuda
from ssmoe.ops.triton.step_cuda import Cut
from tests.ops.step_cases import Case, Steps, chain_errors, in_turn, inputs

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation is compiled with g++")


class ORDER:
    """Whether the emulation runs the last thread first."""

    backwards = 0


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, nvrtc.Macros], ctypes.CDLL]:
    """A source and its macros -> the emulation of it."""
    folder = tmp_path_factory.mktemp("emulated")

    @cache
    def build(source: Path, macros: nvrtc.Macros) -> ctypes.CDLL:
        library = folder / f"{abs(hash(macros))}.so"
        options = [f"-D{key}={value}" for key, value in macros]
        here = Path(__file__).with_name("step_emulator.cpp")
        flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f'-DSOURCE="{source}"']
        subprocess.run([str(COMPILER), *flags, *options, "-o", str(library), str(here)], check=True)
        return ctypes.CDLL(str(library))

    return build


@pytest.fixture(autouse=True, scope="module")
def emulated(libraries: Callable[[Path, nvrtc.Macros], ctypes.CDLL]) -> Iterator[None]:
    """`nvrtc.launch` runs the kernel here."""

    def launch(source: Path, kernel: str, macros: nvrtc.Macros, blocks: int, threads: int, words: list[int],
               shared: int, *, cluster: int, together: bool = False, early: bool = False) -> None:  # fmt: skip
        known = dict(macros)
        assert (threads, cluster) == (32 * int(known.get("WARPS", 8)), int(known["CS"]))
        assert kernel == (
            "product" if "PRODUCT" in known else "steps" if known["WHOLE"] == "1" else "middle_step"
        )
        assert together == (kernel != "product")
        values = (ctypes.c_int64 * len(words))(*words)
        # the emulation refuses another size of shared memory than the source's
        assert libraries(source, macros).emulate(ctypes.c_long(blocks), values, ORDER.backwards, shared) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "launch", launch)
        yield


def with_cut(cut: step_cuda.Cut) -> Steps:
    """`mamba_steps` by the kernel."""

    def steps(x: Tensor, layers: Any, *, norm_eps: float, **states: Any) -> Any:
        outs = states["out_convs"], states["out_ssms"]
        y = step_cuda.steps(x, layers, cut, norm_eps, states["conv_states"], states["ssm_states"], *outs)
        return y, *outs

    return steps


def judge(given: list[dict[str, Any]], cut: step_cuda.Cut) -> None:
    for i, (ours, eager) in enumerate(chain_errors(given, with_cut(cut))):
        assert ours <= 2 * eager + 1e-6, f"output {i}: {ours:.1e}, eager {eager:.1e}"


def case(b: int, d: int, c: int, taps: int, r: int, layers: int = 1) -> list[dict[str, Any]]:
    return [inputs(Case(b, d, c, 16, taps + 1, r), torch.bfloat16) for _ in range(layers)]


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize(
    ("b", "d", "c", "taps", "r", "cut"),
    [
        (1, 64, 128, 3, 8, Cut(2, 2, 8, 1, 1)),
        (5, 128, 192, 3, 16, Cut(2, 1, 8, 2, 3)),
        (19, 64, 128, 2, 40, Cut(2, 2, 8, 1, 1)),
        (70, 64, 64, 1, 8, Cut(2, 1, 8, 1, 1)),
        # more units of products than warps, and as many weights ahead as registers hold
        (3, 640, 512, 3, 48, Cut(2, 1, 8, 1, 2)),
    ],
)
@torch.no_grad()
def test_parity(b: int, d: int, c: int, taps: int, r: int, cut: Cut, backwards: int) -> None:
    ORDER.backwards = backwards
    judge(case(b, d, c, taps, r, layers=2), cut)


def test_parity_of_a_residual_stream_in_bfloat16() -> None:
    given = case(9, 64, 128, 3, 8, layers=2)
    given[0]["x"] = given[0]["x"].bfloat16()
    judge(given, Cut(2, 2, 8, 1, 1))


@torch.no_grad()
def test_a_row_has_the_same_bits_among_any_others() -> None:
    cut, given = Cut(2, 2, 8, 1, 1), case(40, 64, 128, 3, 8)
    together = in_turn(given, with_cut(cut))
    for some in (1, 9, 17, 33):
        rows = {name: given[0][name][40 - some :].contiguous() for name in ("x", "conv_state", "ssm_state")}
        for all_rows, own in zip(together, in_turn([given[0] | rows], with_cut(cut)), strict=True):
            assert torch.equal(all_rows[40 - some :], own)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize(
    ("d", "r", "clusters", "slots", "whole"),
    [(512, 32, 8, 8, True), (768, 48, 12, 8, True), (768, 48, 24, 8, False), (2560, 160, 10, 2, False)],
)
def test_the_size_of_shared_memory(
    d: int, r: int, clusters: int, slots: int, whole: bool, rows: int, libraries: Any
) -> None:
    sizes = step_cuda.Sizes(d, 2 * d, r, 16, 3)
    cut = step_cuda.divided(sizes, 8, clusters, slots, whole)
    assert cut is not None
    shared = step_cuda.shared_bytes(sizes, cut, rows)
    assert shared <= 227 * 1024
    assert (
        libraries(step_cuda.SOURCE, step_cuda.macros(sizes, cut, rows, bfloat16=False, layers=1)).end()
        == shared
    )


def with_middle(cut: Cut) -> Steps:
    """`mamba_steps` whose norm, in_proj and out_proj are torch's."""

    def steps(x: Tensor, layers: Any, *, norm_eps: float, **states: Any) -> Any:
        for layer, *kept in zip(layers, *states.values(), strict=True):
            norm, _, in_proj, *_, out_proj = layer
            h = torch.nn.functional.rms_norm(x, norm.shape, norm, norm_eps).to(in_proj.dtype)
            y = step_cuda.middle(linear(h, in_proj), layer, cut, *kept)
            x = x + linear(y, out_proj)
        return x, states["out_convs"], states["out_ssms"]

    return steps


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize(("b", "terms", "width"), [(1, 64, 96), (19, 384, 128), (70, 1536, 256)])
@pytest.mark.parametrize("stream", [None, torch.float32, torch.bfloat16], ids=str)
def test_a_product(b: int, terms: int, width: int, stream: torch.dtype | None, backwards: int) -> None:
    ORDER.backwards = backwards
    a, w = torch.randn(b, terms).bfloat16(), torch.randn(width, terms).bfloat16()
    residual = None if stream is None else torch.randn(b, width).to(stream)
    out = torch.full((b, width), float("nan"), dtype=stream or torch.bfloat16)
    cut = step_cuda.product_cuts(terms, width, 227 * 1024)[0]
    step_cuda.product(a, w, residual, out, cut, early=True)
    exact = a.double() @ w.double().T + (0 if residual is None else residual.double())
    bound = 1e-6 if stream == torch.float32 else 2**-8
    assert float((out.double() - exact).norm() / exact.norm()) < bound


def test_products_that_do_not_divide() -> None:
    assert step_cuda.product_cuts(64, 40, 227 * 1024) == []
    assert step_cuda.product_cuts(40, 96, 227 * 1024) == []


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize("b", [1, 19, 70])
@torch.no_grad()
def test_parity_of_the_middle(b: int, backwards: int) -> None:
    ORDER.backwards = backwards
    # fewer pieces of states are held than there are
    for i, (ours, eager) in enumerate(chain_errors(case(b, 40, 256, 3, 40, 2), with_middle(Cut(2, 2, 2)))):
        assert ours <= 2 * eager + 1e-6, f"output {i}: {ours:.1e}, eager {eager:.1e}"


@pytest.mark.parametrize(
    "sizes",
    [
        (768, 1536, 48, 32, 3),  # states
        (768, 1536, 44, 16, 3),  # delta's width is not whole vectors
        (768, 1536, 48, 16, 0),  # no convolution
        (520, 1040, 33, 16, 3),
        (96, 192, 8, 16, 3),
    ],
)
def test_sizes_that_do_not_divide(sizes: tuple[int, ...]) -> None:
    assert step_cuda.divided(step_cuda.Sizes(*sizes), 8, 16) is None
