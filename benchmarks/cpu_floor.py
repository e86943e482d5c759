"""What a kernel could take at best here, from ceilings measured in the same run (`ceilings.cpp`)."""

import ctypes
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# What one update of one state costs, in vector operations on the multiply-add units, besides exponentials:
# drive B, the recurrence and <C, h>; backward the recurrence again, dC, dB, dh, q, dA, ddelta, dx.
FORWARD_FMA, BACKWARD_FMA = 3, 10
# With AVX-512 an exponential takes five more of them: what the units alone, busy without a gap, would need.
FORWARD_UNITS, BACKWARD_UNITS = FORWARD_FMA + 5, BACKWARD_FMA + 5


def compiled(folder: Path) -> ctypes.CDLL | None:
    """`ceilings.cpp` as a library, or None where there is no compiler."""
    here, target = Path(__file__).parent, folder / "ceilings.so"
    compiler = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]
    flags = ["-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-w"]
    command = [
        compiler, *flags, "-fno-math-errno", "-shared", "-fPIC", f"-I{here.parent / 'csrc'}",
        str(here / "ceilings.cpp"), "-o", str(target),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        return None
    return ctypes.CDLL(str(target)) if done.returncode == 0 else None


def together(threads: int, f: Callable[[int], float]) -> float:
    """The sum of what f returns on so many threads at once."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(f, range(threads)))


class Ceilings:
    """Rates of `threads` cores: exp and fma in vectors a second, stream in bytes a second."""

    def __init__(self, library: ctypes.CDLL, threads: int, count: int) -> None:
        for name in ("exp_rate", "fma_rate", "stream_rate"):
            getattr(library, name).restype = ctypes.c_double
        self.lanes = library.lanes()
        self.exp = together(threads, lambda _: library.exp_rate())
        self.fma = together(threads, lambda _: library.fma_rate())
        part = count // threads // 16 * 16
        arrays = torch.zeros(3, threads, part)

        def stream(i: int) -> float:
            x, y, out = (ctypes.c_void_p(arrays[j, i].data_ptr()) for j in range(3))
            return library.stream_rate(x, y, out, ctypes.c_int64(part))

        self.stream = together(threads, stream)

    def floor_ms(self, l: int, d: int, n: int, item: int) -> tuple[float, float]:
        """(forward, forward + backward): the longer of arithmetic and of moving inputs and outputs once."""
        updates = l * d * n / self.lanes
        forward = updates * (1 / self.exp + FORWARD_FMA / self.fma)
        backward = updates * (1 / self.exp + BACKWARD_FMA / self.fma)
        row = l * d * item  # x, delta, y; backward x, delta, dy, dx, ddelta
        return (
            max(forward, 3 * row / self.stream) * 1e3,
            (max(forward, 3 * row / self.stream) + max(backward, 5 * row / self.stream)) * 1e3,
        )

    def units_ms(self, l: int, d: int, n: int) -> tuple[float, float] | None:
        """(forward, forward + backward) of the multiply-add units alone, or None without AVX-512."""
        updates = l * d * n / self.lanes / self.fma * 1e3
        return (
            (FORWARD_UNITS * updates, (FORWARD_UNITS + BACKWARD_UNITS) * updates)
            if self.lanes == 16
            else None
        )


def flops(dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of multiply-adds on registers. bfloat16 without its own instructions has float32's ceiling.

    Needs a C++ compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        if library is None:
            raise RuntimeError("no C++ compiler: the ceiling cannot be measured; install g++ or clang")
        library.fma_rate.restype = library.pair_rate.restype = ctypes.c_double
        single = 2 * together(threads, lambda _: library.fma_rate())
        pairs = 4 * together(threads, lambda _: library.pair_rate())
        return library.lanes() * (pairs if dtype == torch.bfloat16 and pairs else single)


def measure(threads: int, count: int) -> Ceilings | None:
    """The ceilings of this machine, or None (said on the terminal) where they cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        if library is None:
            print("no C++ compiler: no floor")
            return None
        return Ceilings(library, threads, count)
