"""The result files: reading them, and the steps and seconds that each run needs to match another's end."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ssmoe.config.load import RunConfig

Result = dict[str, Any]


class Match(NamedTuple):
    """Where a run first is at or below a loss, and how many times sooner than the baseline's own end.

    The baseline's end is its first evaluation at or below its final loss.
    """

    step: int
    seconds: float
    fewer_steps: float
    less_time: float


def read(path: Path) -> Result:
    """One file; empty where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def finished(path: Path, config: RunConfig) -> bool:
    """Whether this very run has ended, well or by diverging."""
    found = read(path)
    mine = config.model_dump(mode="json")
    same = found.get("configuration", {}) | {"data": None} == mine | {"data": None}
    return same and found["status"] in ("done", "diverged")


def collect(folder: Path) -> list[Result]:
    """Every result below a folder, in order of its path."""
    return [read(path) for path in sorted(folder.rglob("*.json"))]


def reach(run: Result, loss: float) -> tuple[int, float] | None:
    """Step and seconds of the first evaluation at or below `loss`; no interpolation."""
    found = next((row for row in run["evaluations"] if row[2] <= loss), None)
    return None if found is None else (found[0], found[3])


def final(run: Result) -> float:
    """The last held-out loss."""
    return run["evaluations"][-1][2]


def match(run: Result, baseline: Result) -> Match | None:
    """Steps and time of `run` to the baseline's final loss; None if it never gets there.

    Raises ValueError for runs planned for different numbers of steps.
    """
    if run["steps"] != baseline["steps"]:
        raise ValueError(f"{run['name']} has {run['steps']} steps and {baseline['name']} {baseline['steps']}")
    own, theirs = reach(baseline, final(baseline)), reach(run, final(baseline))
    assert own is not None
    if theirs is None:
        return None
    return Match(*theirs, own[0] / theirs[0], own[1] / theirs[1])


def tuned(run: Result, found: list[Result]) -> Result | None:
    """The Mamba that ends lowest among those that read the same number of tokens in as many steps."""
    same = [
        other
        for other in found
        if other["side"] == "mamba"
        and other["status"] == "done"
        and not other["one_sided"]
        and (other["steps"], other["tokens"]) == (run["steps"], run["tokens"])
    ]
    return min(same, key=final, default=None)


def table(found: list[Result]) -> list[str]:
    """A line a run, the best of each budget first."""
    lines = [f"{'run':44} {'status':8} {'steps':>6} {'active':>7} {'loss':>8} {'tok/s':>9} {'match':>6} {'steps x':>8} {'time x':>7}"]
    ended = [run for run in found if run["evaluations"]]
    for run in sorted(ended, key=lambda run: (run["steps"], final(run))):
        baseline = tuned(run, found)
        matched = match(run, baseline) if baseline else None
        cells = ("-", "-", "-")
        if matched:
            cells = (str(matched.step), f"{matched.fewer_steps:.2f}", f"{matched.less_time:.2f}")
        mark = "*" if baseline is run else " "
        lines.append(
            f"{mark}{run['stage'] + '/' + run['name']:43} {run['status']:8} {run['steps']:6} {run['active'] / 1e6:6.2f}M "
            f"{final(run):8.4f} {run.get('tokens_per_second', 0):9,} {cells[0]:>6} {cells[1]:>8} {cells[2]:>7}"
        )
    lines += [f" {run['stage']}/{run['name']}: {run['status']} {run.get('error', '')}" for run in found if not run["evaluations"]]
    return [*lines, "* the tuned Mamba of its number of steps, whose final loss is to be matched"]
