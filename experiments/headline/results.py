"""The result files: reading them, and the steps and seconds that each run needs to match another's end."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ssmoe.config.differences import differences
from ssmoe.config.load import RunConfig

Result = dict[str, Any]
ENDED = ("done", "diverged")
AVERAGED, LAST = 2, 5
"""Columns of an evaluation: the loss of what is evaluated, averaged weights where the recipe has them, and
that of the last weights, None where they are the same."""


class Match(NamedTuple):
    """Where a run first is at or below a loss, and how many times sooner than the baseline itself.

    The baseline's own figure is that of its first evaluation at or below its final loss.
    """

    step: int
    seconds: float
    fewer_steps: float
    less_time: float


def read(path: Path) -> Result:
    """One file; empty where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def compact(values: Mapping[str, Any]) -> str:
    """JSON with a line a key, and a line an evaluation."""
    lines: list[str] = []
    for key, value in values.items():
        text = json.dumps(value)
        if key == "evaluations":
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]" if value else "[]"
        lines.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def finished(found: Result, config: RunConfig) -> bool:
    """Whether this very run has ended, well or by diverging; `found` may be empty."""
    return found.get("status") in ENDED and _same(found["configuration"], config)


def _same(stored: dict[str, Any], config: RunConfig) -> bool:
    """Whether a stored configuration is of the same run, whatever it is called and wherever its data lies.

    Keys that are newer than the stored run have their defaults.
    """
    try:
        other = RunConfig.model_validate(stored)
    except ValidationError:
        return False
    return not differences(config, other)


def read_all(path: Path | None) -> list[Result]:
    """Those of a file of results; none without a file."""
    return [] if path is None else json.loads(path.read_text())


def collect(folder: Path) -> list[Result]:
    """Every result below a folder, in order of its path."""
    return [read(path) for path in sorted(folder.rglob("*.json"))]


def reach(run: Result, loss: float, column: int = AVERAGED) -> tuple[int, float] | None:
    """Step and seconds of the first evaluation at or below `loss`; no interpolation."""
    found = next((row for row in run["evaluations"] if row[column] <= loss), None)
    return None if found is None else (found[0], found[3])


def final(run: Result, column: int = AVERAGED) -> float:
    """The last held-out loss."""
    return run["evaluations"][-1][column]


def match(run: Result, baseline: Result, column: int = AVERAGED) -> Match | None:
    """Steps and time of `run` to the baseline's final loss; None if it never gets there.

    column: AVERAGED, or LAST for the loss of the last weights on both sides.

    Raises ValueError for runs planned for different numbers of steps.
    """
    if run["steps"] != baseline["steps"]:
        raise ValueError(
            f"{run['name']} was planned for {run['steps']} steps and {baseline['name']} for "
            f"{baseline['steps']}: compare runs of equal length"
        )
    target = final(baseline, column)
    own, found = reach(baseline, target, column), reach(run, target, column)
    assert own is not None
    return None if found is None else Match(*found, own[0] / found[0], own[1] / found[1])


def of(runs: Sequence[Result], entry: str, tokens: float | None = None) -> list[Result]:
    """The finished runs of an entry of the final stage, by seed; without `tokens` those of the most."""
    found = [
        run for run in runs if run["stage"] == "final" and run["entry"] == entry and run["status"] == "done"
    ]
    most = max((run["tokens"] for run in found), default=0) if tokens is None else tokens
    return sorted((run for run in found if run["tokens"] == most), key=lambda run: run["seed"])


def pairs(
    runs: Sequence[Result], entry: str, baseline: str, tokens: float | None = None
) -> list[tuple[Result, Result]]:
    """(run, baseline) of equal seed and length."""
    return [
        (run, other)
        for run in of(runs, entry, tokens)
        for other in of(runs, baseline, run["tokens"])
        if run["seed"] == other["seed"]
    ]


def tuned(run: Result, found: Sequence[Result]) -> Result | None:
    """The Mamba that ends lowest among those that read as many tokens in as many steps, with the same seed
    if there is one."""
    same = [
        other
        for other in found
        if other["side"] == "mamba"
        and other["status"] == "done"
        and not other["one_sided"]
        and (other["steps"], other["tokens"]) == (run["steps"], run["tokens"])
    ]
    of_seed = [other for other in same if other["seed"] == run["seed"]]
    return min(of_seed or same, key=final, default=None)


def table(found: Sequence[Result]) -> list[str]:
    """A line a run, the best of each number of steps first."""
    titles = ("status", "steps", "active", "loss", "tokens/s", "match", "steps x", "time x")
    lines = [_line("run", *titles)]
    with_losses = [run for run in found if run["evaluations"]]
    for run in sorted(with_losses, key=lambda run: (run["steps"], final(run))):
        baseline = tuned(run, with_losses)
        matched = match(run, baseline) if baseline else None
        cells = ("-", "-", "-")
        if matched:
            cells = (str(matched.step), f"{matched.fewer_steps:.2f}", f"{matched.less_time:.2f}")
        name = f"{'*' if baseline is run else ' '}{run['stage']}/{run['name']}"
        numbers = (f"{run['active'] / 1e6:.2f}M", f"{final(run):.4f}", f"{run.get('tokens_per_second', 0):,}")
        lines.append(_line(name, run["status"], str(run["steps"]), *numbers, *cells))
    empty = [run for run in found if not run["evaluations"]]
    lines += [f" {run['stage']}/{run['name']}: {run['status']} {run.get('error', '')}" for run in empty]
    return [*lines, "* the tuned Mamba of its number of steps, whose final loss is to be matched"]


def _line(name: str, *cells: str) -> str:
    widths = (9, 6, 8, 8, 9, 6, 8, 7)
    return f"{name:48}" + " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
