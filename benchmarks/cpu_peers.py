"""What the CPU benchmarks share: parity first, medians, and how much of the cores others took meanwhile."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def require_parity(name: str) -> None:
    """Refuse to time a kernel whose parity test is red."""
    test = Path(__file__).parents[1] / "tests" / "ops" / f"test_cpu_{name}.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", "not slow", str(test)], capture_output=True
    )
    if done.returncode:
        sys.exit(f"parity is red: {test} fails, so there is nothing to time")


def median_ms(f: Callable[[], object], repeats: int = 7) -> float:
    """Median wall-clock time of f in milliseconds, after one call that does not count."""
    f()
    times: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        f()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


class Others:
    """Cores that other processes, or other machines on the same hardware, took since this was made.

    Linux only (0 elsewhere), to 10 ms of a core's time.
    """

    def __init__(self) -> None:
        self._begin = self._now()

    def cores(self) -> float:
        time_, busy, own = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return max(0.0, busy - own) / time_

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds on the clock, of work of all cores, and of this process."""
        clock, own = time.perf_counter(), time.process_time()
        stat = Path("/proc/stat")
        if not stat.exists():
            return clock, own, own
        ticks = [int(n) for n in stat.read_text().split("\n", 1)[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        return clock, (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), own
