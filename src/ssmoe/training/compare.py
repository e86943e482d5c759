"""Several runs against a baseline: steps, tokens and wall-clock to the baseline's final held-out loss."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssmoe.config.count import count_parameters
from ssmoe.config.load import RunConfig
from ssmoe.training.folder import read_run
from ssmoe.training.metrics import Record, read_metrics
from ssmoe.training.report import Curve, draw_curves

SHARED_TRAIN = ("steps", "batch_size", "tbptt", "eval_every", "eval_rows", "average", "precision")
"""Fields of `train` that must be equal for step counts and losses to be comparable."""


class Row(NamedTuple):
    """One run. The last four are None where the run never reaches the baseline's final loss.

    steps_ratio, seconds_ratio: the baseline's figure over this run's, above 1 is faster.
    """

    name: str
    active: int
    total: int
    final_loss: float
    seconds: float
    match_step: int | None
    match_tokens: int | None
    steps_ratio: float | None
    seconds_ratio: float | None


class Comparison(NamedTuple):
    """target: the baseline's final held-out loss."""

    baseline: str
    target: float
    rows: list[Row]
    curves: list[Curve]


def check_comparable(runs: Sequence[RunConfig], baseline: str | None) -> None:
    """Raise ValueError unless the runs read the same batches, predict the same and are evaluated alike."""
    names = [run.name for run in runs]
    if len(runs) < 2:
        raise ValueError("a comparison needs at least two presets or run files")
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have the same name among {', '.join(names)}: give one a file of its own")
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not one of the runs {', '.join(names)}")
    first = runs[0]
    for run in runs[1:]:
        objectives = first.model.objective, run.model.objective
        _check_equal("model.objective", *objectives, first.name, run.name)
        for key, value in first.data.model_dump().items():
            _check_equal(f"data.{key}", value, getattr(run.data, key), first.name, run.name)
        for key in SHARED_TRAIN:
            _check_equal(
                f"train.{key}", getattr(first.train, key), getattr(run.train, key), first.name, run.name
            )


def compare_runs(folders: Sequence[Path], baseline: str) -> Comparison:
    """Read finished runs; the baseline is told by its folder's name."""
    evaluations = {folder.name: _evaluations(folder) for folder in folders}
    target = evaluations[baseline][-1]["held_out_loss"]
    reference = _match(evaluations[baseline], target)
    assert reference is not None
    rows: list[Row] = []
    for folder in folders:
        records = evaluations[folder.name]
        match = _match(records, target)
        step, tokens, seconds = ((match or {}).get(key) for key in ("step", "tokens", "seconds"))
        count = count_parameters(read_run(folder).model)
        rows.append(
            Row(
                name=folder.name,
                active=count.active,
                total=count.total,
                final_loss=records[-1]["held_out_loss"],
                seconds=records[-1]["seconds"],
                match_step=step,
                match_tokens=tokens,
                steps_ratio=reference["step"] / step if step else None,
                seconds_ratio=reference["seconds"] / seconds if seconds else None,
            )
        )
    curves = [
        Curve(name, [r["step"] for r in records], [r["held_out_loss"] for r in records])
        for name, records in evaluations.items()
    ]
    return Comparison(baseline, target, rows, curves)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """compare.json and, where matplotlib is installed, compare.png in `folder`."""
    values: dict[str, Any] = {
        "baseline": comparison.baseline,
        "target_loss": comparison.target,
        "rows": [row._asdict() for row in comparison.rows],
    }
    (folder / "compare.json").write_text(json.dumps(values, indent=2) + "\n")
    draw_curves(
        comparison.curves, folder / "compare.png", y_label="held-out loss (nats)", target=comparison.target
    )


def _check_equal(key: str, first: object, second: object, first_name: str, second_name: str) -> None:
    if first != second:
        raise ValueError(
            f"{key} is {first} in {first_name} and {second} in {second_name}: give {key}=... for all runs"
        )


def _evaluations(folder: Path) -> list[Record]:
    records = [record for record in read_metrics(folder) if record["mode"] == "eval"]
    if not records:
        raise ValueError(f"{folder} has no held-out evaluation yet: let it finish")
    return records


def _match(records: Sequence[Record], target: float) -> Record | None:
    return next((record for record in records if record["held_out_loss"] <= target), None)
