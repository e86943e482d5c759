"""The selective scan on the CPU: ssmoe and peers of PyPI side by side, forward and with backward.

    pip install -e '.[benchmark]'; python benchmarks/cpu_scan.py [--threads 2] [--length 2048] [--peers]

Peers: mambapy's parallel scan and the token loop of transformers' slow path (forward only: its backward is
quadratic in length). Huge pages for torch's own allocations: set THP_MEM_ALLOC_ENABLE=1 for the whole run.
"""

import argparse
import os
import resource

import torch
import torch.nn.functional as F
from cpu_peers import median_ms, require_parity
from torch import Tensor

from ssmoe import ops


def inputs(l: int, d: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    x, delta = torch.randn(1, l, d, dtype=dtype), torch.randn(1, l, d, dtype=dtype) - 4
    A = -torch.arange(1, n + 1).float().repeat(d, 1)
    return [x, delta, A, torch.randn(1, l, n, dtype=dtype), torch.randn(1, l, n, dtype=dtype), torch.ones(d)]


def transformers_slow(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The arithmetic of transformers' MambaMixer.slow_forward, from its discretisation to its skip."""
    x, step = x.transpose(1, 2), F.softplus(delta).transpose(1, 2)
    decay = torch.exp(A[None, :, None, :] * step[:, :, :, None])
    drive = step[:, :, :, None] * B[:, None, :, :].float() * x[:, :, :, None].float()
    state = x.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for i in range(x.shape[2]):
        state = decay[:, :, i] * state + drive[:, :, i]
        outputs.append((state @ C[:, i].unsqueeze(-1))[:, :, 0])
    return (torch.stack(outputs, dim=-1) + x * D[None, :, None]).transpose(1, 2)


def mambapy_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    step = F.softplus(delta)
    states = pscan(torch.exp(step.unsqueeze(-1) * A), step.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1))
    return (states @ C.unsqueeze(-1)).squeeze(3) + D * x


def peers() -> dict[str, object]:
    found: dict[str, object] = {"transformers slow path": transformers_slow}
    try:
        import mambapy  # noqa: F401

        found["mambapy pscan"] = mambapy_scan
    except ModuleNotFoundError:
        print("mambapy is not installed: left out")
    return found


def forward_backward(f: object, args: list[Tensor]) -> float:
    leaves = [t.clone().requires_grad_() for t in args]
    dy = torch.randn_like(args[0])

    def step() -> None:
        y = f(*leaves)  # type: ignore[operator]
        (y[0] if isinstance(y, tuple) else y).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return median_ms(step)


def forward(f: object, args: list[Tensor]) -> float:
    with torch.no_grad():
        return median_ms(lambda: f(*args))  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=1536)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--peers", action="store_true", help="time the peers too (minutes)")
    arguments = parser.parse_args()
    require_parity("selective_scan")
    scan = ops.load("cpu").selective_scan
    print(
        f"torch {torch.__version__}, huge pages asked of torch: {os.environ.get('THP_MEM_ALLOC_ENABLE', '0')}"
    )
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            args = inputs(arguments.length, arguments.channels, arguments.states, dtype)
            print(
                f"{threads} threads, {dtype}, L {arguments.length}"
                f" D {arguments.channels} N {arguments.states}"
            )
            rows: dict[str, object] = {"ssmoe": scan}
            if arguments.peers and dtype == torch.float32:
                rows |= peers()
            for name, f in rows.items():
                print(f"  {name:24} forward {forward(f, args):9.2f} ms", flush=True)
                if f is not transformers_slow:
                    both = forward_backward(f, args)
                    print(f"  {name:24} with backward {both:9.2f} ms", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
