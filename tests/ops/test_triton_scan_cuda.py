"""The CUDA C++ scan on a CPU: `emulator.cpp` runs the same source, thread by thread, beside the reference."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU backend needs triton: pip install triton")

from ssmoe.ops.triton import nvrtc, scan_cuda
from ssmoe.ops.triton.scan_cuda import Cut
from tests.ops.emulate import COMPILER, build
from tests.ops.triton_cases import documents, errors, everything, scan_inputs, without

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation is compiled with g++")
Emulate = Callable[..., None]


class ORDER:
    """Whether the emulation runs the last thread first."""

    backwards = 0


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulate:
    """A stand-in for `nvrtc.launch` that runs the kernel here."""
    folder, libraries = tmp_path_factory.mktemp("emulated"), {}

    def launch(
        source: Path,
        kernel: str,
        macros: nvrtc.Macros,
        blocks: int,
        threads: int,
        words: list[int],
        shared: int = 0,
    ) -> None:
        if macros not in libraries:
            library = folder / f"{len(libraries)}.so"
            libraries[macros] = build("emulator.cpp", source, macros, library)
        values = (ctypes.c_int64 * len(words))(*words)
        libraries[macros].emulate(kernel.encode(), ctypes.c_long(blocks), threads, values, ORDER.backwards)

    return launch


@pytest.fixture(autouse=True)
def on_the_cpu(emulated: Emulate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "launch", emulated)
    monkeypatch.setattr(scan_cuda, "covers", lambda x, A: A.shape[-1] in scan_cuda.WIDTHS)


def cut(
    monkeypatch: pytest.MonkeyPatch, forward: Cut, backward: Cut, chunks: int, every: int = 0, turns: int = 1
) -> None:
    monkeypatch.setattr(scan_cuda, "forward_cut", lambda *_: forward)
    monkeypatch.setattr(scan_cuda, "backward_cut", lambda *_: backward)
    monkeypatch.setattr(scan_cuda, "saved_every", lambda *_: every or backward.tile)
    monkeypatch.setattr(scan_cuda, "_chunks", lambda *_: chunks)
    monkeypatch.setattr(scan_cuda, "_turns", lambda *_: turns)


def close(found: dict[str, tuple[float, float]], floor: float = 5e-7) -> None:
    for name, (ours, eager) in found.items():
        assert ours <= 2 * eager + floor, f"{name}: {ours:.1e}, eager {eager:.1e}"


SMALL = Cut(4, 2, 2, 16, 8, 1), Cut(4, 2, 2, 16, 4, 1)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_parity(dtype: torch.dtype, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, *SMALL, chunks)
    close(errors("selective_scan", scan_inputs(2, 35, 38, 16, dtype)))


@pytest.mark.parametrize("backwards", [0, 1])
def test_backward_in_turn(backwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, *SMALL, 1, turns=3)
    inputs = scan_inputs(2, 99, 38, 16, torch.float32)
    close(errors("selective_scan", inputs, segments=documents(2, 99)))
    plain = scan_inputs(2, 35, 66, 16, torch.bfloat16)
    found = everything(scan, plain, {})
    monkeypatch.setattr(ORDER, "backwards", backwards)
    for name, value in everything(scan, plain, {}).items():
        assert torch.equal(value, found[name]), name
    cut(monkeypatch, *SMALL, 1)
    for name, value in everything(scan, plain, {}).items():
        assert torch.allclose(value, found[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("every", [4, 8])
def test_saved_closer(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, *SMALL, 2, every)
    close(errors("selective_scan", scan_inputs(2, 35, 38, 16, torch.bfloat16)))


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 3])
def test_segments(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, *SMALL, chunks)
    inputs = scan_inputs(2, 35, 37, 16, torch.float32)
    close(errors("selective_scan", inputs, segments=documents(2, 35)))


@pytest.mark.slow
@pytest.mark.parametrize("n", scan_cuda.WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (1, 20, 66)])
def test_shapes(shape: tuple[int, int, int], n: int) -> None:
    close(errors("selective_scan", scan_inputs(*shape, n, torch.float32)))


def test_without_the_optional_inputs() -> None:
    inputs = without(scan_inputs(1, 9, 6, 16, torch.float32), "D", "z", "delta_bias", "initial_state")
    close(errors("selective_scan", inputs))


def test_strided_inputs_are_read_in_place() -> None:
    inputs = scan_inputs(2, 9, 8, 16, torch.bfloat16)
    expected = everything(scan, inputs, {})
    wide = torch.cat((inputs["x"], inputs["z"]), dim=-1)
    inputs["x"], inputs["z"] = wide.chunk(2, dim=-1)
    narrow = torch.cat((inputs["delta"][..., :3], inputs["B"], inputs["C"]), dim=-1)
    _, inputs["B"], inputs["C"] = narrow.split((3, 16, 16), dim=-1)
    for name, value in everything(scan, inputs, {}).items():
        assert torch.equal(value, expected[name]), name


def scan(**inputs: Tensor) -> tuple[Tensor, Tensor]:
    names = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    y, final, _ = scan_cuda.scan_cuda(*(inputs[name] for name in names), None, True)
    return y, final


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_order_of_threads_changes_nothing(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, *SMALL, chunks)
    inputs = scan_inputs(1, 35, 66, 16, torch.float32)
    first = everything(scan, inputs, {})
    monkeypatch.setattr(ORDER, "backwards", 1)
    for name, value in everything(scan, inputs, {}).items():
        assert torch.equal(value, first[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lanes", "channels", "sub"), [(1, 1, 4), (2, 2, 4), (4, 4, 4), (4, 1, 8), (8, 2, 8)]
)
def test_other_cuts(lanes: int, channels: int, sub: int, monkeypatch: pytest.MonkeyPatch) -> None:
    same = Cut(lanes, channels, 2, 16, sub, 1)
    cut(monkeypatch, same, same, 2)
    close(errors("selective_scan", scan_inputs(1, 35, 50, 16, torch.float32)))


def test_the_choice_of_kernels_is_compiled_in_one_graph() -> None:
    x = torch.zeros(2)
    whole = torch.compile(lambda x: x + nvrtc.available(), fullgraph=True, backend="eager")
    assert torch.equal(whole(x), x + nvrtc.available())


@pytest.mark.parametrize(
    ("shape", "n", "taken"),
    [((8, 2048, 1536), 16, True), ((8, 2048, 1536), 17, False), ((1, 2**31, 1), 16, False)],
)
def test_which_kernels_take_a_scan(
    shape: tuple[int, int, int], n: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(nvrtc, "available", lambda: True)
    x = mock.Mock(is_cuda=True, shape=shape)
    assert scan_cuda.covers(x, torch.zeros(1, n)) is taken
    assert not scan_cuda.covers(mock.Mock(is_cuda=False, shape=shape), torch.zeros(1, n))


@pytest.mark.parametrize(
    ("b", "length", "d"), [(1, 1, 1), (8, 2048, 1536), (64, 1024, 1024), (1, 2**17, 1536)]
)
def test_every_wave_is_full_or_the_length_is_whole(b: int, length: int, d: int) -> None:
    for chosen in (scan_cuda.forward_cut(b, d, 16, 0), scan_cuda.backward_cut(16)):
        chunks = scan_cuda._chunks(chosen, b, length, d)
        assert chunks == 1 or scan_cuda._waves(chosen, b, d) * (chunks - 1) <= 3
        assert chunks == 1 or length >= 8 * chosen.tile * chunks


@pytest.mark.parametrize(
    ("n", "every", "tile"), [(16, 0, 128), (8, 8, 128), (16, 16, 128), (16, 4, 64), (32, 0, 64), (32, 8, 64)]
)
def test_tiles_where_one_channel_a_lane_fills_a_gpu(n: int, every: int, tile: int) -> None:
    cut = scan_cuda.forward_cut(8, 1536, n, every)
    assert (cut.channels, cut.tile) == (1, tile)
    assert scan_cuda.forward_cut(64, 1024, n, every) == scan_cuda.FORWARD
    # B and C twice, within what a block has without asking
    assert 4 * tile * n * 4 <= 32 * 1024


@pytest.mark.parametrize(
    ("shape", "every"),
    [
        ((8, 2048, 1536), 4),
        ((16, 2048, 1536), 8),
        ((64, 1024, 1024), 16),
        ((2, 100, 256), 4),
        ((64, 2048, 4096), 16),
    ],
)
def test_states_are_saved_as_close_as_their_memory_allows(shape: tuple[int, int, int], every: int) -> None:
    x, A = torch.empty(shape, device="meta"), torch.empty(shape[2], 16)
    assert scan_cuda.saved_every(x, A) == every
    assert every == 16 or 4 * x.numel() * 16 // every <= scan_cuda.SAVED


def test_opcheck() -> None:
    inputs = scan_inputs(1, 9, 6, 16, torch.float32)
    names = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    arguments = [inputs[name].requires_grad_() for name in names]
    torch.library.opcheck(scan_cuda.scan_cuda, (*arguments, None, True))
