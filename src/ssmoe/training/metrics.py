"""metrics.jsonl: a line a step and a line an evaluation, and what the lines say."""

import json
import os
from collections.abc import Mapping
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

from ssmoe.model.layer import RouterStats
from ssmoe.training.step import StepResult

METRICS = "metrics.jsonl"
TIMES = ("seconds", "tokens_per_second")
"""Keys that differ between two runs of the same configuration."""

Record = dict[str, Any]


def step_record(
    step: int, tokens: int, result: StepResult, rate: float, seconds: float, tokens_per_second: float
) -> Record:
    """The line of one optimiser step. Loss is in training mode: capacity, where set, drops tokens."""
    lm, balance, z = (float(value) for value in (result.lm, result.balance, result.z))
    record: Record = {
        "step": step,
        "mode": "train",
        "tokens": tokens,
        "loss": lm + balance + z,
        "lm_loss": lm,
        "balance": balance,
        "z": z,
        "learning_rate": rate,
        "grad_norm": float(result.grad_norm),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens_per_second, 1),
    }
    if result.routers:
        record["router"] = router_summary(result.routers)
    return record


def eval_record(step: int, tokens: int, seconds: float, values: Mapping[str, float]) -> Record:
    """The line of one held-out evaluation, always in eval mode (dropless)."""
    return {"step": step, "mode": "eval", "tokens": tokens, "seconds": round(seconds, 3), **values}


def router_summary(routers: dict[int, RouterStats]) -> dict[str, float]:
    """The worst layer's imbalance and the means over layers; the number of keys does not grow with the model.

    max_over_mean: largest load of an expert over the mean load, worst layer. dead: experts without a token,
    all layers. dropped: share of assignments lost to capacity. entropy: of a token's probabilities, over
    log(e), mean over layers. confidence: mean probability of the first choice.
    """
    loads = [stats.load.double() for stats in routers.values()]
    assignments = max(1.0, sum(float(load.sum()) for load in loads))
    entropies = [float(stats.entropy) / max(log(stats.load.shape[-1]), 1e-9) for stats in routers.values()]
    return {
        "max_over_mean": max(float(load.max() / load.mean().clamp(min=1e-9)) for load in loads),
        "dead": sum(int((load == 0).sum()) for load in loads),
        "dropped": sum(int(stats.dropped) for stats in routers.values()) / assignments,
        "entropy": fmean(entropies),
        "confidence": fmean(float(stats.confidence) for stats in routers.values()),
    }


class MetricsFile:
    """Appends records, each handed to the system at once: a killed process has lost none that it wrote."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / METRICS).open("a")

    def write(self, record: Record) -> None:
        """Append one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have every line on the disk, whatever happens to the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(folder: Path) -> list[Record]:
    """Every complete line of a run's metrics, in order; a line cut off by a crash is left out."""
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no {METRICS}")
    records: list[Record] = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def truncate_metrics(folder: Path, step: int) -> None:
    """Remove the lines after `step`, which a resumed run writes again."""
    kept = [record for record in read_metrics(folder) if record["step"] <= step]
    temporary = folder / f"{METRICS}.new"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(temporary, folder / METRICS)
