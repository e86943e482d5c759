"""The expert bank on the CPU beside a dense layer of equal FLOPs through the same GEMM library.

python benchmarks/cpu_experts.py [--threads 1 2]
"""

import argparse

import torch
from cpu_peers import median_ms, require_parity
from torch import Tensor

from ssmoe import ops

TOKENS, D_MODEL, D_EXPERT = 4096, 512, 2048
LAYERS = {"32 experts, top-1": (32, 1, D_EXPERT), "128 experts, top-4": (128, 4, D_EXPERT // 4)}


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def dense(x: Tensor, dy: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> None:
    """SwiGLU forward and backward, nine products."""
    h, g = product(x, up), product(x, gate)
    s = torch.sigmoid(g)
    inner = g * s * h
    product(inner, down)
    dinner = product(dy, down.t())
    dh, dg = dinner * g * s, dinner * h * s * (1 + g * (1 - s))
    product(dy.t(), inner.t()), product(dh.t(), x.t()), product(dg.t(), x.t())
    product(dh, up.t()) + product(dg, gate.t())


def experts(x: Tensor, dy: Tensor, e: int, k: int, f: int) -> float:
    d = x.shape[1]
    up, gate = ((torch.randn(e, f, d) / d**0.5).to(x.dtype).requires_grad_() for _ in range(2))
    down = (torch.randn(e, d, f) / f**0.5).to(x.dtype).requires_grad_()
    expert, weight = torch.rand(x.shape[0], e).topk(k).indices.int(), torch.rand(x.shape[0], k)
    leaf = x.clone().requires_grad_()
    apply = ops.load("cpu").expert_mlp

    def step() -> None:
        y = apply(leaf, up, down, gate, expert=expert, weight=weight, activation="silu")
        y.backward(dy)
        for t in (leaf, up, gate, down):
            t.grad = None

    return median_ms(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    require_parity("expert_mlp")
    for threads in parser.parse_args().threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            x, dy = (torch.randn(TOKENS, D_MODEL).to(dtype) for _ in range(2))
            up, gate = (torch.randn(D_EXPERT, D_MODEL).to(dtype) for _ in range(2))
            down = torch.randn(D_MODEL, D_EXPERT).to(dtype)
            base = median_ms(lambda: dense(x, dy, up, gate, down))  # noqa: B023
            print(f"{threads} threads, {dtype}: dense SwiGLU forward and backward {base:.1f} ms")
            for name, (e, k, f) in LAYERS.items():
                time = experts(x, dy, e, k, f)
                print(f"  {name:20} {time:8.1f} ms, {time / base:.2f} times dense")


if __name__ == "__main__":
    main()
