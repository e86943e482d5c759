"""The public functions that join folders: training with evaluation, and comparing runs.

With `cli`, the composition root: only here and there may `training` meet `eval`.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ssmoe.config.differences import differences
from ssmoe.config.load import RunConfig
from ssmoe.data.prepare import Prepared, prepare
from ssmoe.data.tokenizer import load_tokenizer
from ssmoe.eval.perplexity import HeldOut, evaluate
from ssmoe.model.feedforwards.mode import token_choice
from ssmoe.model.lm import LM
from ssmoe.training.checkpoint import find_weights, list_checkpoints
from ssmoe.training.compare import Comparison, check_comparable, compare_runs, write_comparison
from ssmoe.training.console import open_reporter
from ssmoe.training.folder import check_folder
from ssmoe.training.loop import Evaluate, check_vocabulary
from ssmoe.training.loop import train as train_loop
from ssmoe.training.report import write_report


class Interrupted(RuntimeError):
    """A run was ended by Ctrl-C; its checkpoint is saved."""


def train(
    run: RunConfig,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Train `run` into `folder` ("runs/NAME" if None) and return the folder.

    resume: go on from the newest checkpoint. overwrite: replace an existing run. console: where progress
    goes, None for nowhere. Raises ValueError for a folder or configuration that does not fit, before
    anything is written; Interrupted after Ctrl-C; `Diverged` for a loss that is not a number.
    """
    if not hasattr(run, "train"):
        raise TypeError(f"train takes a RunConfig, not {type(run).__name__}: ssmoe.preset(NAME) is one")
    folder = Path("runs") / run.name if folder is None else Path(folder)
    console = console or Console(quiet=True)
    check_folder(folder, run, resume=resume, overwrite=overwrite)
    tokenizer = load_tokenizer(find_weights(folder)) if resume else None
    data = prepare(run.data, tokenizer=tokenizer, log=lambda line: _print(console, line))
    with open_reporter(console, run.train.steps) as reporter:
        finished = train_loop(
            run, folder, data, evaluate=evaluator(run, data), resume=resume, reporter=reporter
        )
    if not finished and not run.train.keep_checkpoints:
        raise Interrupted("stopped; nothing is saved, because train.keep_checkpoints=0")
    if not finished:
        command = f"ssmoe train {shlex.quote(str(folder))} --resume"
        raise Interrupted(f"stopped; the checkpoint is saved: go on with `{command}`")
    for line in write_report(folder):
        _print(console, line)
    return folder


def compare(
    runs: Sequence[RunConfig],
    folder: str | Path = "runs/compare",
    *,
    baseline: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Train `runs` on the same batches and measure each against `baseline` (a run's name; None is the first).

    A run matches at its first held-out evaluation at or below the baseline's final held-out loss. resume:
    each run goes on from where it is, those without a checkpoint from the start. Raises ValueError, before
    anything is trained, where data, steps, batch or evaluations differ between the runs.
    """
    check_comparable(runs, baseline)
    folder, console = Path(folder), console or Console(quiet=True)
    rules = {run.name: _rules(folder / run.name, resume=resume, overwrite=overwrite) for run in runs}
    tokenizer = prepare(runs[0].data, log=lambda line: _print(console, line)).tokenizer
    for run in runs:
        check_folder(folder / run.name, run, **rules[run.name]._asdict())
        check_vocabulary(run.model, tokenizer)
    base = next(run for run in runs if run.name == (baseline or runs[0].name))
    for run in runs:
        _print(console, f"== {run.name}")
        for key, (mine, theirs) in differences(run, base).items():
            _print(console, f"unlike {base.name}: {key} is {mine}, not {theirs}")
        try:
            train(run, folder / run.name, **rules[run.name]._asdict(), console=console)
        except Interrupted as stop:
            if not run.train.keep_checkpoints:
                raise
            message = "stopped; the checkpoint is saved: go on with the same command and --resume"
            raise Interrupted(message) from stop
    comparison = compare_runs([folder / run.name for run in runs], baseline or runs[0].name)
    write_comparison(comparison, folder)
    return comparison


class _Rules(NamedTuple):
    resume: bool
    overwrite: bool


def _rules(folder: Path, *, resume: bool, overwrite: bool) -> _Rules:
    """What resuming a comparison means for one of its runs."""
    if not resume or overwrite or list_checkpoints(folder):
        return _Rules(resume, overwrite)
    return _Rules(resume=False, overwrite=folder.exists())


def evaluator(run: RunConfig, data: Prepared) -> Evaluate:
    """What scores a model on the held-out text as `run` says, always in eval mode."""
    batch_size = run.train.micro_batch_size or run.train.batch_size

    def score(model: LM) -> HeldOut:
        return evaluate(
            model,
            data.held_out,
            context=run.data.context,
            batch_size=batch_size,
            rows=run.train.eval_rows,
            isolate=run.data.isolate_documents,
            mask_fraction=run.data.mask_fraction,
        )

    def evaluate_held_out(model: LM) -> Mapping[str, float]:
        found = score(model)
        values = {
            "held_out_loss": found.loss,
            "held_out_bits_per_byte": found.bits_per_byte,
            "held_out_targets": found.targets,
        }
        with token_choice(model) as changed:
            if changed:
                values["held_out_loss_token_choice"] = score(model).loss
        return values

    return evaluate_held_out


def _print(console: Console, line: str) -> None:
    """As it is: brackets in a path are no markup."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
