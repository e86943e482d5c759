"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere."""

from collections.abc import Generator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ssmoe.training.metrics import Record

PLAIN_SECONDS = 10.0
"""Seconds between plain progress lines."""


class Reporter(Protocol):
    """Where a run's messages and records go."""

    def message(self, text: str) -> None:
        """A line for the reader."""
        ...

    def record(self, record: Record) -> None:
        """A training step or an evaluation that has just ended."""
        ...


class Silent:
    """Reports nothing."""

    def message(self, text: str) -> None:
        """Drop the line."""

    def record(self, record: Record) -> None:
        """Drop the record."""


class PlainReporter:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._last = float("-inf")

    def message(self, text: str) -> None:
        """Print the line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def record(self, record: Record) -> None:
        """Print evaluations always, steps now and then and at the end."""
        if record["mode"] == "eval":
            self.message(describe_evaluation(record))
        elif monotonic() - self._last >= PLAIN_SECONDS or record["step"] == self._steps:
            self._last = monotonic()
            left = (self._steps - record["step"]) * record["seconds"] / record["step"]
            self.message(
                f"step {record['step']:>6}/{self._steps}  loss {record['lm_loss']:.4f}  "
                f"{record['tokens_per_second']:,.0f} tokens/s  {left:,.0f} s left"
            )


class BarReporter:
    """A rich progress bar with loss, tokens a second and time left."""

    def __init__(self, console: Console, progress: Progress, task: TaskID) -> None:
        self._console, self._progress, self._task = console, progress, task
        self._moved = False

    def message(self, text: str) -> None:
        """Print the line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def record(self, record: Record) -> None:
        """Move the bar, or print an evaluation above it."""
        if record["mode"] == "eval":
            self.message(describe_evaluation(record))
            return
        if not self._moved:
            # the steps before a resumed one took no time now
            self._progress.reset(self._task, completed=record["step"])
            self._moved = True
        self._progress.update(
            self._task,
            completed=record["step"],
            loss=f"{record['lm_loss']:.4f}",
            rate=f"{record['tokens_per_second']:,.0f}",
        )


@contextmanager
def open_reporter(console: Console, steps: int) -> Generator[Reporter]:
    """The reporter that suits `console`, for a run of `steps`."""
    if console.quiet:
        yield Silent()
        return
    if not console.is_terminal:
        yield PlainReporter(console, steps)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield BarReporter(console, progress, progress.add_task("train", total=steps, loss="-", rate="-"))


def describe_evaluation(record: Record) -> str:
    """An evaluation in one line."""
    return (
        f"step {record['step']:>6}  held-out loss {record['held_out_loss']:.4f}  "
        f"{record['held_out_bits_per_byte']:.3f} bits/byte"
    )
