"""Train every preset of a folder, several at once on one device; what is finished is passed over.

    python experiments/scaling/train.py PRESETS OUT [--jobs 8] [--only GLOB] [key=value ...]

PRESETS holds what `ssmoe plan --ladder` wrote; key=value goes to every run. Each of the `--jobs` processes
takes the longest run that is left. Small models leave a GPU idle between their launches, so several share it.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

from ssmoe.config.load import RunConfig, load_run


def main() -> int:
    """Print a line a run; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("presets", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of the presets to train")
    given = parser.parse_intermixed_args()
    runs = [load_run(str(path), given.overrides) for path in sorted(given.presets.glob(f"{given.only}.toml"))]
    runs = [run for run in runs if not (given.out / run.name / "report.html").is_file()]
    runs.sort(key=duration, reverse=True)
    begin = perf_counter()
    failed = 0
    # spawned: a process that was forked cannot use CUDA
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(train, run, given.out / run.name): run for run in runs}
        for job in as_completed(jobs):
            error = job.exception()
            failed += error is not None
            result = "done" if error is None else f"failed: {error}"
            print(f"{perf_counter() - begin:7.1f} s  {jobs[job].name}: {result}", flush=True)
    return 1 if failed else 0


def duration(run: RunConfig) -> int:
    """Steps times layers: a small model's step costs its launches, not what they compute."""
    return run.train.steps * len(run.model.layers)


def train(run: RunConfig, folder: Path) -> None:
    """In a process of its own; an interrupted run goes on."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ssmoe

    resume = any(folder.glob("checkpoints/step-*"))
    ssmoe.train(run, folder, resume=resume, overwrite=folder.is_dir() and not resume)


if __name__ == "__main__":
    sys.exit(main())
