"""One GPU: time of every kernel and of whole layers, beside the peers' recorded figures.

    python benchmarks/gpu.py [--only scan]

bfloat16 activations, float32 state, N = 16; median over CUDA-graph replays, forward alone or
forward + backward; decoding and prefill are timed by the host around the engine, its graphs recorded before.
"recorded" columns were measured once on an H200 with the official packages and are printed, not run. Refuses
to run where the kernels disagree with the reference.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ssmoe.config.load import preset
from ssmoe.generation.engine import decode
from ssmoe.generation.graph import runner
from ssmoe.generation.sampler import Sampling
from ssmoe.model.build import build
from ssmoe.model.lm import LM
from ssmoe.ops import load
from ssmoe.ops.triton import scan_cuda
from ssmoe.ops.triton.selective_scan import scan_backward, scan_forward


class Row(NamedTuple):
    """One line: the recorded best of the peers, the bound that no version beats, the aim, and our time."""

    work: str
    recorded: float | None
    floor: float | None
    reach: float
    measure: Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name contains one of these")
    only = parser.parse_args().only
    check()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}; milliseconds")
    print(f"{'work':58} {'recorded':>9} {'floor':>7} {'reach':>7} {'ssmoe':>7}  reached")
    for row in rows():
        if any(part in row.work for part in only):
            ours = row.measure()
            recorded, floor = ("-" if v is None else f"{v:g}" for v in (row.recorded, row.floor))
            mark = "yes" if ours <= row.reach else "no"
            print(f"{row.work:58} {recorded:>9} {floor:>7} {row.reach:7g} {ours:7.3f}  {mark}", flush=True)
            torch.cuda.empty_cache()


def rows() -> Iterator[Row]:
    shapes = (
        ((8, 2048, 1536), (0.447, 0.097, 0.17), (2.19, 0.29, 0.75)),
        ((64, 1024, 1024), (1.11, 0.26, 0.45), (5.61, 0.77, 1.9)),
        ((1, 131072, 1536), (4.39, 0.77, 1.5), (19.5, 2.3, 6.5)),
    )
    for (b, length, d), forward, both in shapes:
        name = f"B{b} D{d} L{length}"
        yield Row(f"scan forward, {name}", *forward, lambda s=(b, length, d): scan(*s, backward=False))
        yield Row(f"scan forward + backward, {name}", *both, lambda s=(b, length, d): scan(*s, backward=True))
    yield Row("convolution forward, B64 D1024 L1024", 0.081, 0.063, 0.08, lambda: convolution(64, 1024, 1024))
    yield Row("Mamba block d512, 65,536 tokens, forward + backward", 7.49, None, 3.2, mamba)
    for e, f, k, recorded, reach in (
        (32, 1536, 1, 3.2, 1.8),
        (128, 384, 4, None, 2.3),
        (256, 192, 8, None, 2.5),
    ):
        name = f"experts {e} x {f} top-{k}, d512, 65,536 tokens, fwd + bwd"
        yield Row(name, recorded, 0.83, reach, lambda c=(e, f, k): experts(*c))
    model = "8 x (Mamba + 32 experts), 64 x 1024 tokens"
    yield Row(f"training step, {model}", 145, 40, 65.5, lambda: training_step()[0])
    yield Row(f"training step, peak GiB, {model}", 47, None, 20, lambda: training_step()[1])

    yield from decode_rows()


def decode_rows() -> Iterator[Row]:
    """Decoding by the engine, host and sampling (greedy) included, ms a step; and reading prompts."""
    aims = {
        "mamba-130m": ((1, 1244, 0.06, 4_000), (64, 62_000, None, 150_000)),
        "mamba-2.8b": ((1, 290, 1.31, 560), (64, 9_890, 1.62, 25_000)),
    }
    for name, lines in aims.items():
        for b, recorded, floor, reach in lines:
            yield Row(
                f"decode {name} shape, batch {b}, a step",
                round(1000 * b / recorded, 3),
                floor,
                1000 * b / reach,
                lambda n=name, b=b: decoding(n, b),
            )
    yield Row("prefill mamba-130m shape, 8 x 2048", 17.8, 5.6, 9, lambda: prefill("mamba-130m", 8, 2048))


def graphed(run: Callable[[], object]) -> float:
    return triton.testing.do_bench_cudagraph(run, rep=100, return_mode="median")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def scan(b: int, length: int, d: int, *, backward: bool) -> float:
    x, delta = normal(b, length, d), normal(b, length, d) * 0.5 - 4
    A = -torch.arange(1, 17, device="cuda").float().repeat(d, 1)
    D, bias = normal(d, dtype=torch.float32), normal(d, dtype=torch.float32)
    inputs = (x, delta, A, normal(b, length, 16), normal(b, length, 16), D)
    if not backward:
        if scan_cuda.covers(x, A):
            return graphed(lambda: scan_cuda.scan_cuda(*inputs, None, bias, None, None, False))
        return graphed(lambda: scan_forward(*inputs, None, bias, None, None, False, False))
    dy, dfinal = normal(b, length, d), torch.zeros(b, d, 16, device="cuda")
    if scan_cuda.covers(x, A):

        def run_cuda() -> None:
            _, _, saved = scan_cuda.scan_cuda(*inputs, None, bias, None, None, True)
            scan_cuda.scan_cuda_backward(dy, dfinal, *inputs, None, bias, None, saved, False)

        return graphed(run_cuda)

    def run() -> None:
        _, _, checkpoints = scan_forward(*inputs, None, bias, None, None, True, False)
        scan_backward(dy, dfinal, *inputs, None, bias, None, checkpoints, False)

    return graphed(run)


def convolution(b: int, length: int, d: int) -> float:
    ops = load("triton")
    x, weight, bias = normal(b, length, d), normal(d, 4, dtype=torch.float32), normal(d, dtype=torch.float32)
    return graphed(lambda: ops.causal_conv1d(x, weight, bias)[0])


def mamba() -> float:
    from ssmoe.model.mixers.mamba import Mamba

    block = Mamba(512, ops=load("triton")).cuda()
    x, dy = normal(64, 1024, 512).requires_grad_(), normal(64, 1024, 512)
    parameters = list(block.parameters())

    def run() -> None:
        torch.autograd.grad(block(x).x, [x, *parameters], dy)

    return graphed(run)


def lm(name: str) -> LM:
    """A preset's model with random weights, in bfloat16."""
    model = build(preset(name).model, backend="triton", device="meta", dtype=torch.bfloat16).eval()
    model.to_empty(device="cuda")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("A_log"):
                states = torch.arange(1, parameter.shape[1] + 1, device="cuda")
                parameter.copy_(states.log().expand_as(parameter))
            else:
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1)
    return model


def decoding(name: str, b: int, steps: int = 256) -> float:
    """Milliseconds a step: the difference between many steps and few, so that reading does not count."""
    model, prompts = lm(name), [[1 + row] * 4 for row in range(b)]

    def run(tokens: int) -> float:
        begin = perf_counter()
        decode(model, prompts, lambda *_: True, sampling=Sampling(0.0), max_new_tokens=tokens, graph=True)
        return perf_counter() - begin

    run(8)  # captures
    return 1000 * median((run(steps + 8) - run(8)) / steps for _ in range(5))


@torch.no_grad()
def prefill(name: str, b: int, length: int) -> float:
    """Milliseconds until the logits after b prompts, as the engine reads the third of a shape and on."""
    pieces = runner(lm(name)).pieces
    ids = torch.randint(1000, (b, length), device="cuda")

    def run() -> float:
        begin = perf_counter()
        pieces(ids, None, None)
        torch.cuda.synchronize()
        return perf_counter() - begin

    for _ in range(5):
        run()
    return 1000 * median(run() for _ in range(20))


def experts(e: int, f: int, k: int) -> float:
    ops = load("triton")
    t, d = 65536, 512
    x, up, down = normal(t, d), normal(e, f, d) / d**0.5, normal(e, d, f) / f**0.5
    expert = torch.rand(t, e, device="cuda").topk(k, dim=1).indices.to(torch.int32)
    weight = torch.rand(t, k, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in (x, up, down, weight)]
    dy = normal(t, d)

    def run() -> None:
        y = ops.expert_mlp(x, up, down, expert=expert, weight=weight, activation="relu")
        torch.autograd.grad(y, leaves, dy)

    return graphed(run)


@functools.cache
def training_step() -> tuple[float, float]:
    """Milliseconds and peak GiB of forward, backward and AdamW: vocabulary 50,304, dropless, d512.

    As training does it: recorded once and replayed. The peak is that of the recording; a replay has no other.
    """
    import numpy as np

    import ssmoe
    from ssmoe.data.packing import Batch
    from ssmoe.training.captured import CapturedStep
    from ssmoe.training.optimizer import build_optimizer, parameter_groups

    changes = ["model.vocab_size=50304", "model.pattern.moe.num_experts=32"]
    run = ssmoe.preset("moe-mamba-25m", [*changes, "model.pattern.moe.capacity_factor=null"])
    model = ssmoe.build(run.model, backend="triton", device="cuda", dtype=torch.bfloat16).train()
    optimizer = build_optimizer(parameter_groups(model), run.train)
    ids = np.random.default_rng(0).integers(0, 50304, (64, 1025))
    documents, starts = np.zeros((64, 1024), np.int32), np.zeros((64, 1024), bool)
    batch = Batch(ids[:, :-1], ids[:, 1:], documents, starts)

    step = CapturedStep(model, optimizer, run.train, isolate=False)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        step(batch, 1e-4)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return triton.testing.do_bench(lambda: step(batch, 1e-4), 500, 2000, return_mode="median"), peak


def check() -> None:
    """A small parity test of every op, so that no wrong kernel is ever timed."""
    kernels, reference = load("triton"), load("reference")
    x, delta, A = normal(2, 100, 96), normal(2, 100, 96), -normal(96, 16, dtype=torch.float32).exp()
    B, C = normal(2, 100, 16), normal(2, 100, 16)
    agree(kernels.selective_scan(x, delta, A, B, C)[0], reference.selective_scan(x, delta, A, B, C)[0])
    weight = normal(96, 4, dtype=torch.float32)
    agree(kernels.causal_conv1d(x, weight)[0], reference.causal_conv1d(x, weight)[0])
    route = {
        "expert": torch.randint(0, 4, (100, 1), device="cuda", dtype=torch.int32),
        "weight": torch.rand(100, 1, device="cuda"),
        "activation": "relu",
    }
    bank = (x[0], normal(4, 64, 96), normal(4, 96, 64))
    agree(kernels.expert_mlp(*bank, **route), reference.expert_mlp(*bank, **route))


def agree(found: Tensor, expected: Tensor) -> None:
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error < 2e-2:
        raise SystemExit(f"the kernels disagree with the reference by {error:.1e}: nothing is timed")


if __name__ == "__main__":
    main()
