"""What a run writes down: the line of a step as soon as its numbers are there, and when the step took place.

On a CPU that is at once. A GPU's numbers arrive later: the line of a step is written while the next one is
being computed, unless an evaluation or a checkpoint asks for it before.
"""

import math
from time import perf_counter
from typing import NamedTuple

from ssmoe.training.arrival import Arrival
from ssmoe.training.console import Reporter
from ssmoe.training.metrics import MetricsFile, Record, step_record
from ssmoe.training.step import StepResult
from ssmoe.training.watch import RouterWatch


class Diverged(RuntimeError):
    """The loss or a gradient is no longer a number."""


class Taken(NamedTuple):
    """A step: its number, the tokens read with it and in it, and the learning rate."""

    step: int
    tokens: int
    batch_tokens: int
    rate: float


class Journal:
    """Turns steps into lines of `metrics` and `reporter`.

    at_once: write a step's line before the next step, waiting for its numbers where they are not there yet.
    seconds: of training, up to the last line. saved: the step of the newest checkpoint, 0 for none; what is
    told of a loss that is not a number.
    """

    def __init__(
        self, metrics: MetricsFile, reporter: Reporter, *, at_once: bool, seconds: float, saved: int
    ) -> None:
        self._metrics, self._reporter, self._at_once = metrics, reporter, at_once
        self._watch = RouterWatch()
        self._pending: tuple[Taken, Arrival] | None = None
        self._mark = perf_counter()
        self.seconds, self.saved = seconds, saved

    def begin(self) -> None:
        """A step begins. Where none is under way, what happened since the last one was no training."""
        if self._pending is None:
            self._mark = perf_counter()

    def add(self, taken: Taken, result: StepResult) -> None:
        """Note a step that has been launched; the line of the one before it is written."""
        arrival = Arrival(result)
        self.settle()
        self._pending = taken, arrival
        if self._at_once:
            self.settle()

    def settle(self) -> None:
        """Write the line that is still missing, if any. Raises Diverged where its loss is not a number."""
        if self._pending is None:
            return
        (taken, arrival), self._pending = self._pending, None
        result = arrival.wait()
        now = perf_counter()
        elapsed, self._mark = now - self._mark, now
        self.seconds += elapsed
        speed = taken.batch_tokens / elapsed
        record = step_record(taken.step, taken.tokens, result, taken.rate, self.seconds, speed)
        self._check_finite(record)
        self.write(record)
        for line in self._watch.check(taken.step, taken.batch_tokens, result.routers):
            self._reporter.message(line)

    def write(self, record: Record) -> None:
        """A line of any kind."""
        self._metrics.write(record)
        self._reporter.record(record)

    def _check_finite(self, record: Record) -> None:
        for key in ("loss", "grad_norm"):
            if not math.isfinite(record[key]):
                where = (
                    f"the checkpoint of step {self.saved} is good"
                    if self.saved
                    else "there is no checkpoint yet"
                )
                raise Diverged(
                    f"{key} is {record[key]} at step {record['step']}; {where}: lower train.learning_rate, "
                    "train.clip_norm or raise train.warmup_fraction"
                )
