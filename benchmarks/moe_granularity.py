"""Tokens a second of an MoE layer at granularity 1 and 8, forward and with backward.

    python benchmarks/moe_granularity.py [--device cuda] [--d-model 512] [--d-expert 1536] [--experts 8]

The two take turns, and the best of the repeats counts, so that another process on the machine disturbs both
alike. Refuses to run where G = 8 is not the same arithmetic on this backend as on the reference.
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from ssmoe.model.feedforwards.moe import MoE
from ssmoe.ops import load


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-expert", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--bfloat16", action="store_true")
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.bfloat16 else torch.float32
    ops = load("auto", given.device)
    layers = {
        g: MoE(given.d_model, num_experts=given.experts, d_expert=given.d_expert, granularity=g, ops=ops).to(
            given.device
        )
        for g in (1, 8)
    }
    x = torch.randn(16, given.tokens // 16, given.d_model, device=given.device, dtype=dtype)
    check(layers[8], x[:1, :64], given.device)
    where = torch.cuda.get_device_name() if given.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{where}, backend {ops.name}, {given}")
    for name, work in (("forward", forward), ("forward + backward", both)):
        speed = dict.fromkeys(layers, 0.0)
        for _ in range(given.repeats):
            for g, layer in layers.items():
                speed[g] = max(speed[g], given.tokens / timed(work, layer, x))
        rates = ", ".join(f"G = {g}: {rate:,.0f} tokens/s" for g, rate in speed.items())
        print(f"{name:<20} {rates}; ratio {speed[8] / speed[1]:.2f}")


def forward(layer: MoE, x: Tensor) -> None:
    """Without a graph."""
    with torch.no_grad():
        layer(x)


def both(layer: MoE, x: Tensor) -> None:
    """A training step's share."""
    out = layer(x.detach().requires_grad_())
    assert out.stats is not None
    (out.x.float().square().mean() + out.stats.balance).backward()


def timed(work: Callable[[MoE, Tensor], None], layer: MoE, x: Tensor) -> float:
    """Seconds."""
    if x.is_cuda:
        torch.cuda.synchronize()
    begin = perf_counter()
    work(layer, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - begin


def check(layer: MoE, x: Tensor, device: str) -> None:
    """Parity with the reference, or no benchmark."""
    with torch.no_grad():
        found = layer(x).x.float()
        used, layer.experts.ops = layer.experts.ops, load("reference", device)
        expected = layer(x).x.float()
        layer.experts.ops = used
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


if __name__ == "__main__":
    main()
