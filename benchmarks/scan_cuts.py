"""One GPU: the CUDA C++ scan under other cuts (lanes, channels, warps, chunks), each checked, then timed.

    python benchmarks/scan_cuts.py [--forward] [--backward] [--shapes B8 B64 B1]

bfloat16 activations, N = 16, no gate unless asked for (as in `gpu.py`); milliseconds a launch, median over
CUDA-graph replays.
A cut is K lanes a channel, CH channels a lane, W warps a block, TILE positions staged, SUB in hand, blocks a
multiprocessor asked of the compiler, and chunks of the length; "in turn": those of a channel one after the
other, in one launch (backward).
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product

import torch
import triton
from torch import Tensor

from ssmoe.ops.triton import nvrtc, scan_cuda
from ssmoe.ops.triton.scan_cuda import Cut
from ssmoe.ops.triton.selective_scan import gate_backward, scan_backward, scan_forward

SHAPES = {"B8": (8, 2048, 1536), "B64": (64, 1024, 1024), "B1": (1, 131072, 1536)}
FORWARD = [
    Cut(4, 1, 4, 32, 8, 4), Cut(4, 1, 2, 32, 8, 8), Cut(4, 1, 4, 32, 16, 4), Cut(4, 2, 4, 32, 8, 3),
    Cut(4, 2, 4, 32, 8, 4), Cut(4, 2, 2, 32, 8, 6), Cut(4, 4, 4, 32, 8, 2), Cut(2, 1, 4, 32, 8, 3),
    Cut(2, 2, 4, 32, 8, 2), Cut(1, 1, 4, 32, 8, 3), Cut(1, 1, 2, 32, 8, 6), Cut(8, 1, 4, 32, 8, 6),
    Cut(8, 2, 4, 32, 8, 4), Cut(4, 1, 4, 64, 16, 3), Cut(4, 1, 4, 128, 16, 3),
]  # fmt: skip
BACKWARD = [
    Cut(4, 2, 4, 16, 4, 3), Cut(4, 2, 4, 16, 4, 4), Cut(4, 2, 2, 16, 4, 6), Cut(4, 4, 4, 16, 4, 2),
    Cut(4, 4, 2, 16, 4, 4), Cut(4, 1, 4, 16, 4, 5), Cut(2, 2, 4, 16, 4, 2),
]  # fmt: skip
CHUNKS = {
    ("B8", True): (1, 3), ("B64", True): (1,), ("B1", True): (22, 43),
    ("B8", False): (1, 3, 4, 6), ("B64", False): (1, 4), ("B1", False): (33, 49, 97),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--cuts", nargs="*", default=[], help="K,CH,W,TILE,SUB,BLOCKS in place of the list")
    parser.add_argument("--chunks", nargs="*", type=int, default=[])
    parser.add_argument("--gate", action="store_true", help="with the gate z, as a model's layers have it")
    parser.add_argument(
        "--every", nargs="*", type=int, default=[], help="positions between saved states; 0: none (forward)"
    )
    args = parser.parse_args()
    given = [Cut(*map(int, cut.split(","))) for cut in args.cuts]
    # (forward, its cuts, positions between saved states)
    passes: list[tuple[bool, list[Cut], list[int]]] = []
    if args.forward:
        passes.append((True, given or FORWARD, args.every or [0]))
    if args.backward:
        passes.append((False, given or BACKWARD, args.every or [4, 8, 16]))
    compile_all(
        [macros(cut, ahead, args.gate, n) for ahead, cuts, every in passes for cut in cuts for n in every]
    )
    for shape in args.shapes:
        for ahead, cuts, every in passes:
            chunks = args.chunks or CHUNKS[shape, ahead]
            (forward if ahead else backward)(shape, cuts, tuple(chunks), args.gate, every)


def macros(cut: Cut, forward: bool, gate: bool, every: int = 0) -> nvrtc.Macros:
    """What `run_forward` and `run_backward` compile for these inputs."""
    z = {"ZT": "bf16" if gate else "float"}
    types = dict.fromkeys(("XT", "DT"), "bf16") | z | dict.fromkeys(("BT", "CT"), "bf16")
    common = {"ALIGNED": True, "SEGMENTS": False, "HAS_Z": gate, **types}
    if not forward:
        rows = (torch.empty(0, dtype=torch.bfloat16),) * (4 if gate else 3)
        shared = scan_cuda.backward_shared(cut, 16, True, False, rows)
        return *scan_cuda._macros(cut, 16, BACKWARD=1, CKPT=every, **common), ("SHARED_BYTES", str(shared))
    return scan_cuda._macros(cut, 16, FORWARD=1, CKPT=every, **common)


def compile_all(wanted: list[nvrtc.Macros]) -> None:
    compile_one = partial(nvrtc.compile_source, scan_cuda.SOURCE, architecture="sm_90")
    with ProcessPoolExecutor(12) as pool:
        binaries = dict(zip(wanted, pool.map(compile_one, wanted), strict=True))
    ordinary = nvrtc.compile_source
    nvrtc.compile_source = lambda source, m, target: binaries.get(m) or ordinary(source, m, target)


def time(run: object) -> float:
    return triton.testing.do_bench_cudagraph(run, rep=30, return_mode="median")


def normal(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="cuda").normal_()


def inputs(b: int, length: int, d: int, gate: bool = False) -> tuple[Tensor | None, ...]:
    A = -torch.arange(1, 17, device="cuda").float().repeat(d, 1)
    D, bias = (torch.randn(d, device="cuda") for _ in range(2))
    return (
        normal(b, length, d),
        normal(b, length, d) * 0.5 - 4,
        A,
        normal(b, length, 16),
        normal(b, length, 16),
        D,
        normal(b, length, d) if gate else None,
        bias,
    )


def apart(found: Tensor, expected: Tensor) -> float:
    """The relative distance, a row of the batch at a time so that float64 fits."""
    pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True)]
    return (
        (sum((f - e).square().sum() for f, e in pairs) / sum(e.square().sum() for _, e in pairs))
        .sqrt()
        .item()
    )


def forward(shape: str, cuts: list[Cut], chunks: tuple[int, ...], gate: bool, saved: list[int]) -> None:
    given = inputs(*SHAPES[shape], gate)
    y, final, _ = scan_forward(*given, None, None, False, False)
    for cut, c, every in product(cuts, chunks, saved):
        name = f"forward {shape:4} {tuple(cut)} chunks {c:3} saved every {every:2}"
        try:
            out = scan_cuda.run_forward(cut, c, *given, None, None, every)
            wrong = f"y {apart(out[0], y):.0e} final {apart(out[1], final):.0e}"
            del out
            ms = time(lambda k=cut, c=c, e=every: scan_cuda.run_forward(k, c, *given, None, None, e))
            print(f"{name}: {ms:7.4f}   {wrong}", flush=True)
        except RuntimeError as error:
            print(f"{name}: {str(error)[:200]}", flush=True)


def backward(shape: str, cuts: list[Cut], chunks: tuple[int, ...], gate: bool, everies: list[int]) -> None:
    b, length, d = SHAPES[shape]
    given = inputs(b, length, d, gate)
    dy, dfinal = normal(b, length, d), torch.zeros(b, d, 16, device="cuda")
    x, delta, A, B, C, D, z, bias = given
    y, _, saved = scan_forward(x, delta, A, B, C, D, None, bias, None, None, True, gate)
    through = gate_backward(dy, y, z, None)[0] if gate else dy
    truth = scan_backward(through, dfinal, x, delta, A, B, C, D, None, bias, None, saved, False)
    kept = (0, 1, 2, 3, 4, 5, 7)  # all but the gate's and the initial state's
    del saved, y, through
    for every in everies:
        saved = scan_cuda.run_forward(scan_cuda.FORWARD, 17 if b == 1 else 1, *given, None, None, every)[2]
        for cut, c in product(cuts, chunks):
            in_turn = c > 1 and scan_cuda._turns(cut, b, length, d) > 1
            name = f"backward {shape:4} {tuple(cut)} chunks {c:3}{' in turn' * in_turn} saved every {every:2}"
            try:
                arguments = (dy, dfinal, *given, None, saved, False, every, in_turn)
                out = scan_cuda.run_backward(cut, c, *arguments)
                wrong = " ".join(f"{apart(out[i], truth[i]):.0e}" for i in kept)
                del out
                ms = time(lambda k=cut, c=c, a=arguments: scan_cuda.run_backward(k, c, *a))
                print(f"{name}: {ms:7.4f}   {wrong}", flush=True)
            except RuntimeError as error:
                print(f"{name}: {str(error)[:200]}", flush=True)
        del saved, arguments


if __name__ == "__main__":
    main()
