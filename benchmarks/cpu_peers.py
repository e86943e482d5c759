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


CALM, TRIES = 0.1, 6
"""Cores that others may take during a measurement; how often one is made until they took less."""
_LEAST, _MOST = 400, 20_000
"""Milliseconds that a measurement takes at least, and after which none is made again."""


def median_ms(f: Callable[[], object], repeats: int = 7) -> float:
    """Median wall-clock time of f in milliseconds, after one call that does not count.

    Of at least `repeats` calls and 0.4 s. Where others took more than CALM of a core meanwhile it is measured
    again, up to TRIES times within 20 s, and the calmest counts; what others took of that one is printed.
    """
    f()
    found: list[tuple[float, float]] = []
    spent = 0.0
    while len(found) < TRIES and spent < _MOST and (not found or found[-1][0] >= CALM):
        others = Others()
        times: list[float] = []
        while len(times) < repeats or sum(times) < _LEAST:
            begin = time.perf_counter()
            f()
            times.append((time.perf_counter() - begin) * 1e3)
        found.append((others.cores(), statistics.median(times)))
        spent += sum(times)
    cores, median = min(found)
    if cores >= CALM:
        print(f"[others took {cores:.2f} cores]", file=sys.stderr, flush=True)
    return median


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
