"""The training loop: batches through steps, with evaluations, checkpoints and a clean end on Ctrl-C."""

import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from ssmoe.config.load import RunConfig
from ssmoe.config.model import ModelConfig
from ssmoe.data.loader import Cursor, batches
from ssmoe.data.masking import hide
from ssmoe.data.packing import Batch
from ssmoe.data.prepare import Prepared
from ssmoe.data.tokenizer import Tokenizer, load_tokenizer
from ssmoe.model.build import build
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.ops import missing
from ssmoe.ops.device import resolve_device
from ssmoe.training.average import Average
from ssmoe.training.captured import CapturedStep, why_not
from ssmoe.training.checkpoint import (
    Progress,
    find_weights,
    latest_checkpoint,
    restore_checkpoint,
    restore_state,
    save_checkpoint,
    start_from,
)
from ssmoe.training.console import Reporter, Silent
from ssmoe.training.diagnosis import where_not_finite
from ssmoe.training.folder import (
    check_data,
    create_folder,
    device_name,
    lock_folder,
    read_environment,
)
from ssmoe.training.journal import Diverged as Diverged
from ssmoe.training.journal import Journal, Taken
from ssmoe.training.metrics import MetricsFile, eval_record, truncate_metrics
from ssmoe.training.optimizer import build_optimizer, parameter_groups
from ssmoe.training.outline import outline
from ssmoe.training.recompute import recompute_layers
from ssmoe.training.schedule import learning_rate
from ssmoe.training.step import StepResult, accumulate, inputs_of, train_step

Evaluate = Callable[[LM], Mapping[str, float]]
"""The model to "held_out_loss", "held_out_bits_per_byte" and whatever else an evaluation line should hold."""


class _Run(NamedTuple):
    config: RunConfig
    folder: Path
    data: Prepared
    model: LM
    optimizer: torch.optim.Optimizer
    average: Average | None
    rows: Iterator[tuple[Batch, Cursor]]
    evaluate: Evaluate
    reporter: Reporter


def train(
    config: RunConfig,
    folder: Path,
    data: Prepared,
    *,
    evaluate: Evaluate,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> bool:
    """Train `config` into `folder` (`check_folder` has allowed it); True when finished, False after Ctrl-C.

    Raises ValueError, before anything is written, for a tokenizer larger than the model's vocabulary, too
    little text, data other than those of the run to resume, or a folder that another process is training
    into; Diverged for a loss that is not a number: the last checkpoint then still stands.
    """
    reporter = reporter or Silent()
    check_vocabulary(config.model, data.tokenizer)
    if resume:
        # the lock first: another process may be about to write the checkpoint that is to be gone on from
        with lock_folder(folder):
            run, progress, state = _resumed(config, folder, data, evaluate, reporter)
            truncate_metrics(folder, progress.step)
            reporter.message(f"resuming {folder} after step {progress.step}")
            return _train(run, progress, state)
    run = _fresh(config, folder, data, evaluate, reporter)
    with lock_folder(folder):
        create_folder(folder, config, run.model.backend, data=_describe_data(data))
        if (other := _other_tokenizer(config.train.init_from, data)) is not None:
            reporter.message(other)
        if config.train.backend == "auto" and run.model.backend == "reference":
            reporter.message(f"slow, on the reference backend: {missing('cpu')}")
        return _train(run, Progress(step=0, tokens=0, cursor=Cursor(), seconds=0.0), None)


def check_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless the model has an embedding for every id of the tokenizer."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model a vocabulary of "
            f"{model.vocab_size}: set model.vocab_size={tokenizer.vocab_size} or another data.tokenizer"
        )
    if model.objective == "masked" and tokenizer.vocab_size == model.vocab_size:
        raise ValueError(
            f"the tokenizer uses all {model.vocab_size} ids and a masked model hides tokens behind one of "
            f"its own: set model.vocab_size={model.vocab_size + 1}"
        )


def _fresh(config: RunConfig, folder: Path, data: Prepared, evaluate: Evaluate, reporter: Reporter) -> _Run:
    model = _build(config, config.train.backend)
    if config.train.init_from is not None:
        start_from(model, config.train.init_from)
    optimizer, average = _updated_by(config, model)
    rows = _rows(config, data, Cursor())
    return _Run(config, folder, data, model, optimizer, average, rows, evaluate, reporter)


def _resumed(
    config: RunConfig, folder: Path, data: Prepared, evaluate: Evaluate, reporter: Reporter
) -> tuple[_Run, Progress, State | None]:
    """From the newest checkpoint; the state is what a run with train.tbptt carries."""
    check_data(folder, _describe_data(data))
    model = _build(config, read_environment(folder)["backend"])
    optimizer, average = _updated_by(config, model)
    checkpoint = latest_checkpoint(folder)
    progress = restore_checkpoint(checkpoint, model, optimizer, average)
    state = None
    if config.train.tbptt is not None:
        state = restore_state(checkpoint, model, config.train.batch_size)
    rows = _rows(config, data, progress.cursor)
    run = _Run(config, folder, data, model, optimizer, average, rows, evaluate, reporter)
    return run, progress, state


def _train(run: _Run, progress: Progress, state: State | None) -> bool:
    """From `progress` on, in a folder that is locked; True when finished."""
    train = run.config.train
    groups = parameter_groups(run.model)
    for line in (*_outline(run.config, run.data, run.model), *groups.describe(train)):
        run.reporter.message(line)
    with (
        closing(MetricsFile(run.folder)) as metrics,
        _threads(train.threads),
        _interruptible() as interrupted,
    ):
        progress = _loop(run, progress, state, metrics, interrupted)
    return progress.step == train.steps


def _updated_by(config: RunConfig, model: LM) -> tuple[torch.optim.Optimizer, Average | None]:
    optimizer = build_optimizer(parameter_groups(model), config.train, model.ops)
    return optimizer, Average(model, config.train.average) if config.train.average else None


def _rows(config: RunConfig, data: Prepared, cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
    return batches(
        data.train,
        context=(config.train.tbptt or 1) * config.data.context,
        batch_size=config.train.batch_size,
        seed=config.data.seed,
        cursor=cursor,
        consecutive=config.train.tbptt is not None,
    )


def _build(config: RunConfig, backend: str) -> LM:
    train = config.train
    dtype = torch.bfloat16 if train.precision == "bfloat16" else None
    device = resolve_device(train.device)
    model = build(config.model, backend=backend, device=device, seed=train.seed, dtype=dtype).train()
    if train.recompute:
        recompute_layers(model)
    return model


def _loop(
    run: _Run,
    progress: Progress,
    state: State | None,
    metrics: MetricsFile,
    interrupted: Callable[[], bool],
) -> Progress:
    train = run.config.train
    take = _stepper(run)
    journal = Journal(
        metrics,
        run.reporter,
        at_once=run.model.embedding.weight.device.type == "cpu",
        seconds=progress.seconds,
        saved=progress.step,
    )
    tokens = progress.tokens
    for step in range(progress.step + 1, train.steps + 1):
        journal.begin()
        batch, cursor = _next(run, progress.cursor)
        rate = learning_rate(train, step - 1)
        before, result = state, take(batch, rate, state)
        state = result.state
        if run.average is not None:
            run.average.update(step)
        tokens += batch.ids.size
        try:
            journal.add(Taken(step, tokens, batch.ids.size, rate), result)
        except Diverged as error:
            raise Diverged(f"{error}{_explain(run, batch, before)}") from None
        if step % train.eval_every == 0 or step == train.steps:
            journal.settle()
            journal.write(eval_record(step, tokens, journal.seconds, _evaluate(run)))
        last = step == train.steps or interrupted()
        saves = train.keep_checkpoints > 0 and (step % train.checkpoint_every == 0 or last)
        if saves or last:
            journal.settle()
        progress = Progress(step, tokens, cursor, journal.seconds)
        if saves:
            # a checkpoint on the disk whose lines are not would leave a gap in a resumed run's
            metrics.sync()
            save_checkpoint(
                run.folder,
                run.model,
                run.data.tokenizer,
                run.optimizer,
                progress,
                keep=train.keep_checkpoints,
                state=state,
                average=run.average,
            )
            journal.saved = step
        if last:
            break
    return progress


def _explain(run: _Run, batch: Batch, state: State | None) -> str:
    """Where a step left the numbers; nothing where its weights have been written over."""
    device = run.model.embedding.weight.device
    if device.type != "cpu":
        return ""
    inputs = inputs_of(batch, device, isolate=run.config.data.isolate_documents)
    train = run.config.train
    return f"; {where_not_finite(run.model, lambda: accumulate(run.model, inputs, train, state))}"


def _evaluate(run: _Run) -> Mapping[str, float]:
    """Of the averaged weights where there are any, the loss of the last ones beside it."""
    found = run.evaluate(run.model)
    if run.average is None:
        return found
    with run.average.applied():
        return {**run.evaluate(run.model), "held_out_loss_last": found["held_out_loss"]}


def _stepper(run: _Run) -> Callable[[Batch, float, State | None], StepResult]:
    """A step of the run: replayed as a CUDA graph where it can be, otherwise launched kernel by kernel."""
    train, isolate = run.config.train, run.config.data.isolate_documents

    def take(batch: Batch, rate: float, state: State | None) -> StepResult:
        return train_step(run.model, run.optimizer, batch, train, rate, isolate=isolate, state=state)

    if not train.cuda_graph or run.model.embedding.weight.device.type != "cuda":
        return take
    if (reason := why_not(run.model, train, isolate=isolate)) is not None:
        run.reporter.message(f"steps are launched kernel by kernel: {reason}")
        return take
    captured = CapturedStep(run.model, run.optimizer, train, isolate=isolate)
    return lambda batch, rate, _: captured(batch, rate)


def _next(run: _Run, cursor: Cursor) -> tuple[Batch, Cursor]:
    """The batch after `cursor`, with tokens hidden for a masked model."""
    batch, after = next(run.rows)
    if run.model.config.objective == "masked":
        data = run.config.data
        mask_id = run.model.config.vocab_size - 1
        batch = hide(batch, mask_id=mask_id, fraction=data.mask_fraction, seed=data.seed, number=cursor.rows)
    return batch, after


def _other_tokenizer(init_from: str | None, data: Prepared) -> str | None:
    """What to tell where the initial weights were trained on other tokens than the run's."""
    if init_from is None:
        return None
    folder = find_weights(init_from)
    if load_tokenizer(folder).fingerprint == data.tokenizer.fingerprint:
        return None
    return (
        f"train.init_from={init_from} was trained with another tokenizer, so its embeddings stand for other "
        f"tokens: set data.tokenizer={folder / 'tokenizer.json'} to keep it"
    )


def _outline(config: RunConfig, data: Prepared, model: LM) -> list[str]:
    device = device_name(config.train.device)
    return outline(config, text_tokens=data.train.num_tokens, backend=model.backend, device=device)


def _describe_data(data: Prepared) -> dict[str, str | int]:
    return {
        "content": data.content_hash,
        "tokenizer": data.tokenizer.fingerprint,
        "train_tokens": data.train.num_tokens,
        "train_bytes": data.train.num_bytes,
        "held_out_tokens": data.held_out.num_tokens,
        "held_out_bytes": data.held_out.num_bytes,
    }


@contextmanager
def _threads(number: int | None) -> Generator[None]:
    """Use `number` CPU threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interruptible() -> Generator[Callable[[], bool]]:
    """Ctrl-C ends the loop after the current step; a second one ends it at once."""
    hit = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal hit
        if hit:
            signal.default_int_handler(number, frame)
        hit = True

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: hit
    finally:
        signal.signal(signal.SIGINT, before)
