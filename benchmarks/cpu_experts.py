"""The expert bank on the CPU beside dense layers of equal FLOPs, peers of PyPI and the machine's ceiling.

    pip install -e '.[benchmark]'; python benchmarks/cpu_experts.py [--threads 1 2] [--peers]

SwiGLU, d 512, 4,096 tokens, forward and backward: 32 experts of 2,048, top-1, and 128 of 512, top-4; bfloat16
also with float32 weights, which are cast anew at every call. To compare with:

- ceiling: the same FLOPs at the rate of multiply-adds on registers
- products alone: the nine products of a dense layer, each by the faster of oneDNN and torch, no activation
- dense layer: ssmoe's own products with the activation fused (one expert, nothing to route)

The last column is how many cores the process got: below its threads, others were at work. Everything runs
once without huge pages and once with them (--pages), for everyone. Peers: the experts of transformers'
Mixtral, eager and grouped_mm. Refuses to run where the parity tests are red.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from cpu_floor import flops
from cpu_peers import median_ms, require_parity
from torch import Tensor

from ssmoe import ops
from ssmoe.ops.cpu import describe

TOKENS, D_MODEL, D_EXPERT = 4096, 512, 2048
LAYERS = {"32 experts, top-1": (32, 1, D_EXPERT), "128 experts, top-4": (128, 4, D_EXPERT // 4)}
FLOPS = 3 * 3 * 2 * TOKENS * D_MODEL * D_EXPERT
PR_SET_THP_DISABLE = 41
Step = Callable[[], object]


def products_ms(dtype: torch.dtype) -> float:
    """Nine products of a dense layer, each by the faster of oneDNN's op and torch's."""
    x, h = torch.randn(TOKENS, D_MODEL).to(dtype), torch.randn(TOKENS, D_EXPERT).to(dtype)
    up, down = torch.randn(D_EXPERT, D_MODEL).to(dtype), torch.randn(D_MODEL, D_EXPERT).to(dtype)
    # left, right, how often: up and gate are two
    shapes = [
        (x, up.t(), 2),
        (h, down.t(), 1),
        (x, down, 1),
        (h, up, 2),
        (x.t(), h, 1),
        (h.t(), x, 2),
    ]
    return sum(count * _fastest(left, right) for left, right, count in shapes)


def _fastest(left: Tensor, right: Tensor) -> float:
    onednn = torch.ops.mkldnn._linear_pointwise
    calls: list[Step] = [
        lambda: left @ right,
        lambda: onednn(left, right.t(), None, "none", [], ""),
        lambda: onednn(right.t(), left, None, "none", [], ""),  # the product's transpose
    ]
    return min(median_ms(call) for call in calls)


def bank(e: int, f: int, dtype: torch.dtype) -> list[Tensor]:
    """up, gate, down"""
    up, gate = ((torch.randn(e, f, D_MODEL) / D_MODEL**0.5).to(dtype).requires_grad_() for _ in range(2))
    return [up, gate, (torch.randn(e, D_MODEL, f) / f**0.5).to(dtype).requires_grad_()]


def backward_of(y: Callable[[], Tensor], dy: Tensor, leaves: list[Tensor]) -> Step:
    def step() -> None:
        y().backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def ours(x: Tensor, dy: Tensor, expert: Tensor, weight: Tensor, weights: list[Tensor]) -> Step:
    up, gate, down = weights
    apply = ops.load("cpu").expert_mlp
    return backward_of(
        lambda: apply(x, up, down, gate, expert=expert, weight=weight, activation="silu"),
        dy,
        [x, weight, *weights],
    )


def transformers_steps(
    x: Tensor, dy: Tensor, expert: Tensor, weight: Tensor, weights: list[Tensor]
) -> dict[str, Step]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    up, gate, down = (w.detach() for w in weights)
    found: dict[str, Step] = {}
    for name in ("eager", "grouped_mm"):
        config = MixtralConfig(
            hidden_size=D_MODEL,
            intermediate_size=up.shape[1],
            num_local_experts=up.shape[0],
            hidden_act="silu",
        )
        config._experts_implementation = name
        layer = MixtralExperts(config)
        layer.gate_up_proj = torch.nn.Parameter(torch.cat((gate, up), dim=1))
        layer.down_proj = torch.nn.Parameter(down.clone())
        narrow = weight.detach().to(x.dtype).requires_grad_()
        call = partial(layer, x, expert.long(), narrow)
        agree(call(), ours_output(x, expert, weight, weights))
        found[f"transformers {name}"] = backward_of(call, dy, [x, narrow, *layer.parameters()])
    return found


def ours_output(x: Tensor, expert: Tensor, weight: Tensor, weights: list[Tensor]) -> Tensor:
    up, gate, down = weights
    return ops.load("cpu").expert_mlp(x, up, down, gate, expert=expert, weight=weight, activation="silu")


def agree(theirs: Tensor, own: Tensor) -> None:
    """A peer that computes something else is not a peer."""
    error = float((theirs.detach().float() - own.detach().float()).norm() / own.detach().float().norm())
    if error > 2e-2:
        sys.exit(f"a peer's output differs by {error:.1e}: nothing to compare")


def busy_ms(step: Step, repeats: int) -> tuple[float, float]:
    """Median milliseconds, and how many cores this process got meanwhile."""
    processor, wall = time.process_time(), time.perf_counter()
    median = median_ms(step, repeats)
    return median, (time.process_time() - processor) / (time.perf_counter() - wall)


def measure(dtype: torch.dtype, threads: int, peers: bool, repeats: int) -> None:
    floor = FLOPS / flops(dtype, threads) * 1e3
    print(f"\n{threads} threads, {str(dtype).removeprefix('torch.')}: ceiling {floor:.1f} ms", flush=True)
    torch.manual_seed(0)
    x, dy = torch.randn(TOKENS, D_MODEL).to(dtype).requires_grad_(), torch.randn(TOKENS, D_MODEL).to(dtype)
    one, first = torch.ones(TOKENS, 1), torch.zeros(TOKENS, 1, dtype=torch.int32)
    alone = products_ms(dtype)
    layer, busy = busy_ms(ours(x, dy, first, one.requires_grad_(), bank(1, D_EXPERT, dtype)), repeats)
    print(f"  {'dense: products alone':44} {alone:8.1f} ms")
    print(f"  {'dense: layer':44} {layer:8.1f} ms, {busy:.2f} cores", flush=True)
    for name, (e, k, f) in LAYERS.items():
        expert, weight = torch.rand(TOKENS, e).topk(k).indices.int(), torch.rand(TOKENS, k).requires_grad_()
        weights = bank(e, f, dtype)
        steps = {"ssmoe": ours(x, dy, expert, weight, weights)}
        if dtype == torch.bfloat16:
            steps["ssmoe, float32 weights"] = ours(x, dy, expert, weight, bank(e, f, torch.float32))
        if peers:
            steps |= transformers_steps(x, dy, expert, weight, weights)
        for who, step in steps.items():
            median, busy = busy_ms(step, repeats)
            print(
                f"  {name + ': ' + who:44} {median:8.1f} ms, {median / alone:5.2f} x products alone, "
                f"{median / layer:5.2f} x dense layer, {median / floor:5.2f} x ceiling, {busy:.2f} cores",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--pages", nargs="*", choices=["small", "huge"], default=["small", "huge"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peers", action="store_true", help="time the peers too (minutes)")
    given = parser.parse_args()
    require_parity("expert_mlp")
    for pages in given.pages:
        # torch reads its switch when it starts, and a process that forbids huge pages cannot take it back
        command = [sys.executable, __file__, "--pages", pages, "--repeats", str(given.repeats)]
        command += [
            "--threads",
            *map(str, given.threads),
            "--dtypes",
            *given.dtypes,
            *["--peers"] * given.peers,
        ]
        switch = {"THP_MEM_ALLOC_ENABLE": str(int(pages == "huge")), "SSMOE_BENCHMARK_CHILD": pages}
        subprocess.run(command, env={**os.environ, **switch}, check=True)


def child(pages: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="*")
    parser.add_argument("--dtypes", nargs="*")
    parser.add_argument("--pages")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--peers", action="store_true")
    given = parser.parse_args()
    if pages == "small":
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    print(f"\n{pages} pages; {describe()}; {versions()}")
    for threads in given.threads:
        torch.set_num_threads(threads)
        for dtype in given.dtypes:
            measure(getattr(torch, dtype), threads, given.peers, given.repeats)


def versions() -> str:
    found = [f"torch {torch.__version__}"]
    for name in ("transformers",):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


if __name__ == "__main__":
    pages = os.environ.get("SSMOE_BENCHMARK_CHILD")
    child(pages) if pages else main()
