"""What the CPU benchmarks share: parity first, medians, and the peers' scans."""

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
