"""One run of the experiment in this process, and what is kept of it: a JSON file of some kilobytes.

A worker process trains one run after another, so that kernels are loaded once. Seconds are of training
alone: evaluations are not counted, and the first steps, in which kernels are compiled, count as later ones.
"""

import gc
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from time import perf_counter, time
from typing import Any

import torch
from copying import parts
from plan import Try
from results import compact
from rules import describe, violations

from ssmoe.api import evaluator
from ssmoe.config.count import count_parameters, training_flops
from ssmoe.data.prepare import Prepared
from ssmoe.model.lm import LM
from ssmoe.training.folder import read_environment
from ssmoe.training.journal import Diverged
from ssmoe.training.loop import train
from ssmoe.training.metrics import Record

COMPILING = 10
"""First steps, whose time is replaced by that of as many median ones."""
LEFT_OVER = 4 << 30
"""Bytes of GPU memory that a worker may keep between two runs."""
COLUMNS = ("step", "tokens", "held_out_loss", "seconds", "training_loss", "held_out_loss_last")
"""The last is of the last weights, where averaged ones are evaluated."""


class OutOfTime(RuntimeError):
    """The deadline passed during a run."""


class Watch:
    """A reporter that keeps the evaluations and writes them down as they come."""

    def __init__(self, path: Path, head: dict[str, Any], deadline: float) -> None:
        self.path, self.head, self.deadline = path, head, deadline
        self.times = [0.0]
        self.losses: list[float] = []
        self.rows: list[list[Any]] = []
        self.router: dict[str, float] | None = None

    def message(self, text: str) -> None:
        """Notes of the loop, such as an unbalanced layer: how many, and the last."""
        if not text.startswith(("weight decay", "no weight decay")):
            self.head["messages"] = self.head.get("messages", 0) + 1
            self.head["last_message"] = text

    def record(self, record: Record) -> None:
        """Raise OutOfTime past the deadline."""
        if record["mode"] == "eval":
            loss = round(fmean(self.losses), 4) if self.losses else float("nan")
            held_out, last = (record.get(key) for key in ("held_out_loss", "held_out_loss_last"))
            row = [record["step"], record["tokens"], held_out, len(self.times) - 1, loss, last]
            self.rows.append([round(value, 5) if isinstance(value, float) else value for value in row])
            self.losses = []
            self.write("running")
            return
        self.times.append(record["seconds"])
        self.losses.append(record["lm_loss"])
        self.router = record.get("router", self.router)
        if time() > self.deadline:
            raise OutOfTime(f"the deadline passed at step {record['step']}")

    def seconds(self) -> list[float]:
        """Training time after each step, from 0 steps on, compiling left out."""
        return without_compiling(self.times)

    def write(self, status: str, **more: Any) -> None:
        """The whole file anew, under a name that is always complete."""
        seconds = self.seconds()
        rows = [[*row[:3], round(seconds[row[3]], 3), *row[4:]] for row in self.rows]
        tokens = rows[-1][1] if rows else 0
        trained = {"seconds": rows[-1][3], "tokens_per_second": round(tokens / rows[-1][3])} if rows else {}
        values = {**self.head, "status": status, **trained, "raw_seconds": self.times[-1], **more}
        values |= {"router": self.router, "columns": COLUMNS, "evaluations": rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(compact(values))
        os.replace(temporary, self.path)


def without_compiling(times: Sequence[float]) -> list[float]:
    """Cumulated seconds (`times`[0] is 0) in which the first steps took as long as the others' median."""
    steps = [after - before for before, after in pairwise(times)]
    if len(steps) < 2 * COMPILING:
        return list(times)
    usual = median(steps[COMPILING:])
    spare = times[COMPILING] - COMPILING * usual
    return [min(i * usual, t) if i <= COMPILING else t - max(spare, 0.0) for i, t in enumerate(times)]


def run(made: Try, data: Prepared, path: Path, *, deadline: float = float("inf")) -> str:
    """Train and write `path`; the status: done, diverged, cut (by the deadline) or failed."""
    begin = perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="headline-"))
    watch = Watch(path, _head(made), deadline)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    status, more = "done", {}
    try:
        train(made.config, folder, data, evaluate=_with_parts(made, data, watch), reporter=watch)
    except Diverged as error:
        status, more = "diverged", {"error": str(error)}
    except OutOfTime as error:
        status, more = "cut", {"error": str(error)}
    except Exception as error:  # noqa: BLE001, whatever it is belongs into the result, and the next run follows
        status, more = (
            "failed",
            {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]},
        )
    if (folder / "environment.json").is_file():
        watch.head["environment"] = read_environment(folder)
    if torch.cuda.is_available():
        more["peak_memory"] = torch.cuda.max_memory_allocated()
    watch.write(status, occupied_seconds=round(perf_counter() - begin, 2), **more)
    shutil.rmtree(folder, ignore_errors=True)
    gc.collect()
    if torch.cuda.is_available() and status != "failed":
        torch.cuda.empty_cache()
    return status


def _with_parts(made: Try, data: Prepared, watch: Watch) -> Callable[[LM], Mapping[str, float]]:
    """The evaluation; at the end of the run also where the loss lies, of the weights evaluated last."""
    evaluate = evaluator(made.config, data)

    def scored(model: LM) -> Mapping[str, float]:
        found = evaluate(model)
        if len(watch.times) - 1 == made.config.train.steps:
            watch.head["parts"] = parts(model, data, made.config)
        return found

    return scored


def _head(made: Try) -> dict[str, Any]:
    config, count = made.config, count_parameters(made.config.model)
    return {
        "name": made.name,
        "entry": made.entry["name"],
        "stage": made.stage,
        "side": made.side,
        "preset": made.entry["preset"],
        "recipe": made.recipe,
        "overrides": made.overrides,
        "one_sided": made.one_sided,
        "note": made.entry.get("note", ""),
        "differs": describe(config, made.reference),
        "breaks": violations(config, made.reference),
        "active": count.active,
        "non_embedding": count.non_embedding,
        "total": count.total,
        "flops_a_token": training_flops(config.model, config.data.context),
        "steps": config.train.steps,
        "tokens": made.tokens,
        "learning_rate": config.train.learning_rate,
        "seed": config.train.seed,
        "configuration": config.model_dump(mode="json"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def serve(connection: Connection, prepare: tuple[Any, ...], deadline: float) -> None:
    """A worker: receives (try, path), trains, sends (status, whether it leaves); None ends it.

    It leaves after a failure, since a GPU error stays with its process, and where memory is not given back.
    """
    loader, *arguments = prepare
    data = loader(*arguments)
    leaves = False
    while not leaves and (task := connection.recv()) is not None:
        made, path = task
        status = run(made, data, path, deadline=deadline)
        leaves = status == "failed" or (
            torch.cuda.is_available() and torch.cuda.memory_reserved() > LEFT_OVER
        )
        connection.send((status, leaves))
