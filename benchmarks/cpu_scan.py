"""The selective scan on the CPU: ssmoe, peers of PyPI and the floor side by side, in one run.

    pip install -e '.[benchmark]'
    python benchmarks/cpu_scan.py [--threads 1 2] [--pages default huge] [--compiled] [--lengths 2048 131072]

The table is printed once for each number of threads and kind of pages; each is a process of its own, in which
ssmoe, the peers and the ceilings behind the floor are measured. Pages `default` is torch as it comes (ssmoe
asks for huge pages itself); `huge` lets torch's allocator ask for them too, so that every peer has them;
`small` forbids them to the whole process, ssmoe included. Medians; the tests of parity must pass first.
"""

import argparse
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from cpu_floor import measure
from cpu_peers import median_ms, require_parity
from cpu_scan_peers import Peer, peers, versions
from torch import Tensor

from ssmoe import ops

PAGES = ("default", "huge", "small")
FORBID_HUGE_PAGES = 41  # PR_SET_THP_DISABLE of prctl


def inputs(l: int, d: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    x, delta = torch.randn(1, l, d, dtype=dtype), torch.randn(1, l, d, dtype=dtype) - 4
    A = -torch.arange(1, n + 1).float().repeat(d, 1)
    return [x, delta, A, torch.randn(1, l, n, dtype=dtype), torch.randn(1, l, n, dtype=dtype), torch.ones(d)]


def ours(*args: Tensor) -> Tensor:
    return ops.load("cpu").selective_scan(*args)[0]


def forward_backward(f: Callable[..., Tensor], args: list[Tensor]) -> Callable[[], None]:
    leaves = [t.clone().requires_grad_() for t in args]
    dy = torch.randn_like(args[0])

    def step() -> None:
        f(*leaves).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def forward(f: Callable[..., Tensor], args: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            f(*args)

    return step


def status_mib(field: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def extra_memory_mib(args: list[Tensor]) -> float:
    """Peak memory of one forward and backward above what was there before, outputs and gradients included."""
    step = forward_backward(ours, [t[:, :64] if t.dim() == 3 else t for t in args])
    step()  # loads what is loaded on a first call, at a length that takes next to no memory
    step = forward_backward(ours, args)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    step()
    return status_mib("VmHWM") - before


def row(name: str, times: Iterable[float], mine: tuple[float, float]) -> None:
    """A line of the table, each time as soon as it is known."""
    print(f"  {name:28}", end="", flush=True)
    for time, ours in zip(times, mine, strict=False):
        print(f"{time:10.2f} {time / ours:8.2f}x", end="", flush=True)
    print(flush=True)


def time_peer(peer: Peer, args: list[Tensor], mine: tuple[float, float], repeats: int) -> None:
    if peer.scan is None:
        print(f"  {peer.name:28}  {peer.missing}")
        return
    args = peer.arrange(args)
    with torch.no_grad():
        torch.testing.assert_close(peer.scan(*args), ours(*args), rtol=1e-3, atol=1e-3)
    steps = [forward, forward_backward] if peer.backward else [forward]
    row(peer.name, (median_ms(make(peer.scan, args), repeats) for make in steps), mine)


def table(arguments: argparse.Namespace, length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    d, n, repeats = arguments.channels, arguments.states, arguments.repeats
    args = inputs(length, d, n, dtype)
    print(f"L {length} D {d} N {n} {dtype}: ms and multiples of ssmoe, forward | with backward")
    if dtype == torch.float32 and length <= 1 << 14 and sys.platform == "linux":
        print(f"  extra memory of ssmoe, forward and backward: {extra_memory_mib(args):.1f} MiB")
    ceilings = measure(torch.get_num_threads(), length * d)
    mine = (median_ms(forward(ours, args), 3 * repeats), median_ms(forward_backward(ours, args), 2 * repeats))
    row("ssmoe", mine, mine)
    print(f"  {'ssmoe, ns a position':28}{mine[0] / length * 1e6:10.0f}{'':10}{mine[1] / length * 1e6:10.0f}")
    if ceilings:
        row("floor", ceilings.floor_ms(length, d, n, args[0].element_size()), mine)
        if units := ceilings.units_ms(length, d, n):
            row("multiply-add units", units, mine)
        print(
            f"  ceilings: {ceilings.exp * ceilings.lanes / 1e9:.1f} G exp/s,"
            f" {ceilings.fma * ceilings.lanes / 1e9:.0f} G multiply-adds/s,"
            f" {ceilings.stream / 1e9:.1f} GB/s"
        )
    if dtype == torch.float32 and length <= 1 << 12 and not arguments.alone:
        for peer in peers():
            if not peer.slow_start or arguments.compiled:
                time_peer(peer, args, mine, repeats)


def child(arguments: argparse.Namespace) -> None:
    """One table a length and dtype, in this process."""
    threads, pages = arguments.threads[0], arguments.pages[0]
    if pages == "small" and ctypes.CDLL(None).prctl(FORBID_HUGE_PAGES, 1, 0, 0, 0):
        print("this system cannot forbid huge pages")
        return
    torch.set_num_threads(threads)
    print(f"\n{threads} threads, pages: {pages}")
    for length in arguments.lengths:
        for dtype in (torch.float32, torch.bfloat16):
            table(arguments, length, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--channels", type=int, default=1536)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=list(PAGES))
    parser.add_argument(
        "--repeats", type=int, default=7, help="calls of a peer, of which the median is taken"
    )
    parser.add_argument("--alone", action="store_true", help="leave the peers out")
    parser.add_argument("--compiled", action="store_true", help="compile the associative scan (minutes)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 7:
        parser.error(f"--repeats {arguments.repeats}: a median of fewer than 7 is not reported")
    if arguments.child:
        return child(arguments)
    require_parity("selective_scan")
    print(versions(), flush=True)
    same = [a for a in sys.argv[1:] if a in ("--alone", "--compiled")]
    for name in ("lengths", "channels", "states", "repeats"):
        value = getattr(arguments, name)
        same += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    for threads in arguments.threads:
        for pages in arguments.pages:
            command = [
                sys.executable,
                __file__,
                "--child",
                "--threads",
                str(threads),
                "--pages",
                pages,
                *same,
            ]
            environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1" if pages == "huge" else "0"}
            subprocess.run(command, env=environment, check=True)
    return None


if __name__ == "__main__":
    main()
