"""Finished runs as points (N, D, G, loss): from run folders or a CSV."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssmoe.config.count import count_parameters
from ssmoe.config.load import RunConfig, load_run
from ssmoe.config.model import (
    ExpertChoiceConfig,
    MambaConfig,
    MambaExpertsConfig,
    MoEConfig,
    MoTConfig,
    ParallelConfig,
    S4DConfig,
)
from ssmoe.scaling.cost import Blocks

COLUMNS = ("N", "D", "G", "loss")
_OTHER_EXPERTS = (ExpertChoiceConfig, MambaExpertsConfig, MoTConfig, ParallelConfig)


class Point(NamedTuple):
    """One finished run."""

    name: str
    parameters: float
    """Total, without embedding and head."""
    tokens: float
    granularity: float
    """G, the experts a token visits: top_k * granularity."""
    loss: float
    """Held-out, in nats a token."""
    expansion: float | None = None
    """E = num_experts / top_k."""
    blocks: Blocks | None = None


def read_points(paths: Sequence[Path]) -> list[Point]:
    """The points of run folders and .csv files."""
    points: list[Point] = []
    for path in paths:
        points += read_csv(path) if path.suffix == ".csv" else [read_run(path)]
    return points


def common_kind(points: Sequence[Point]) -> tuple[Blocks | None, float | None]:
    """The kind of blocks and the expansion E that all runs share, None where not known.

    Raises ValueError where they differ: a law holds for one kind of block and one E.
    """
    kinds: set[Blocks] = {point.blocks for point in points if point.blocks is not None}
    expansions = sorted({point.expansion for point in points if point.expansion is not None})
    if len(kinds) > 1:
        raise ValueError(f"the runs mix {', '.join(sorted(kinds))} models: fit one law for each")
    if len(expansions) > 1:
        listed = ", ".join(f"{expansion:g}" for expansion in expansions)
        raise ValueError(f"the runs mix expansions E = {listed}: fit one law for each")
    return next(iter(kinds), None), next(iter(expansions), None)


def read_run(folder: Path) -> Point:
    """The point of one run folder: its last held-out loss and the tokens trained on until then.

    Raises ValueError for a run that is unfinished, has no held-out loss, or has experts that no law is about.
    """
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {name}")
    run = load_run(str(folder / "config.json"))
    last = _last_held_out(folder / "metrics.jsonl")
    if last["step"] < run.train.steps:
        raise ValueError(
            f"{folder}: the last held-out loss is of step {last['step']} of {run.train.steps}; a law needs "
            "finished runs, whose learning rate has decayed: resume it, or leave it out"
        )
    granularity, expansion, blocks = _experts(run, folder)
    return Point(
        name=str(folder),
        parameters=float(count_parameters(run.model).non_embedding),
        tokens=float(last["tokens"]),
        granularity=granularity,
        loss=_positive(last["held_out_loss"], "held_out_loss", str(folder)),
        expansion=expansion,
        blocks=blocks,
    )


def read_csv(path: Path) -> list[Point]:
    """Points of a CSV with the columns N, D, G and loss, and perhaps E and name."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}: the columns are N, D, G, loss")
        return [_from_row(row, f"{path}:{rows.line_num}") for row in rows]


def _from_row(row: dict[str, str], where: str) -> Point:
    size, tokens, granularity, loss = (_positive(row[name], name, where) for name in COLUMNS)
    expansion = _positive(row["E"], "E", where) if row.get("E") else None
    return Point(row.get("name") or where, size, tokens, granularity, loss, expansion)


def _positive(value: object, name: str, where: str) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise ValueError(f"{where}: {name} = {value!r} is not a positive number")
    return number


def _last_held_out(path: Path) -> dict[str, Any]:
    last: dict[str, Any] | None = None
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            entry: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if "held_out_loss" in entry and (last is None or entry["step"] >= last["step"]):
            last = entry
    if last is None:
        raise ValueError(f"{path} has no held-out loss: train with train.eval_every set")
    return last


def _experts(run: RunConfig, folder: Path) -> tuple[float, float | None, Blocks | None]:
    """(G, E, kind of blocks); E is None without experts, the kind for blocks that no law is about."""
    layers = [layer for layer in run.model.layers if isinstance(layer, MoEConfig)]
    unknown = sorted({layer.kind for layer in run.model.pattern if isinstance(layer, _OTHER_EXPERTS)})
    kinds = {(layer.bank[2], layer.num_experts / layer.top_k) for layer in layers}
    if unknown or len(kinds) > 1:
        what = f"has layers of kind {', '.join(unknown)}" if unknown else "mixes MoE layers of several G or E"
        raise ValueError(f"{folder} {what}: no law describes it")
    granularity, expansion = kinds.pop() if kinds else (1, None)
    return float(granularity), expansion, _blocks(run, experts=bool(layers))


def _blocks(run: RunConfig, *, experts: bool) -> Blocks | None:
    mixers = {type(layer) for layer in run.model.pattern}
    if S4DConfig in mixers:
        return None
    if MambaConfig in mixers:
        return "mamba-moe" if experts else None
    return "moe" if experts else "dense"
