"""The training loop: batches through steps, with evaluations, checkpoints and a clean end on Ctrl-C."""

import math
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import NamedTuple

import torch

from ssmoe.config.load import RunConfig
from ssmoe.config.model import ModelConfig
from ssmoe.data.loader import Cursor, batches
from ssmoe.data.masking import hide
from ssmoe.data.packing import Batch
from ssmoe.data.prepare import Prepared
from ssmoe.data.tokenizer import Tokenizer
from ssmoe.model.build import build
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.training.checkpoint import (
    Progress,
    latest_checkpoint,
    restore_checkpoint,
    restore_state,
    save_checkpoint,
    start_from,
)
from ssmoe.training.console import Reporter, Silent
from ssmoe.training.folder import (
    check_data,
    create_folder,
    lock_folder,
    read_environment,
    resolve_device,
)
from ssmoe.training.metrics import MetricsFile, Record, eval_record, step_record, truncate_metrics
from ssmoe.training.optimizer import build_optimizer, parameter_groups
from ssmoe.training.schedule import learning_rate
from ssmoe.training.step import train_step
from ssmoe.training.watch import RouterWatch

Evaluate = Callable[[LM], Mapping[str, float]]
"""The model to "held_out_loss", "held_out_bits_per_byte" and whatever else an evaluation line should hold."""


class Diverged(RuntimeError):
    """The loss or a gradient is no longer a number."""


class _Run(NamedTuple):
    config: RunConfig
    folder: Path
    data: Prepared
    model: LM
    optimizer: torch.optim.Optimizer
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
        check_data(folder, _describe_data(data))
    model = _build(config, read_environment(folder)["backend"] if resume else config.train.backend)
    if config.train.init_from is not None and not resume:
        start_from(model, config.train.init_from)
    groups = parameter_groups(model)
    optimizer = build_optimizer(groups, config.train)
    progress = Progress(step=0, tokens=0, cursor=Cursor(), seconds=0.0)
    if resume:
        progress = restore_checkpoint(latest_checkpoint(folder), model, optimizer)
    windows = config.train.tbptt or 1
    rows = batches(
        data.train,
        context=windows * config.data.context,
        batch_size=config.train.batch_size,
        seed=config.data.seed,
        cursor=progress.cursor,
        consecutive=config.train.tbptt is not None,
    )
    state = None
    if resume and config.train.tbptt is not None:
        state = restore_state(latest_checkpoint(folder), model, config.train.batch_size)
    run = _Run(config, folder, data, model, optimizer, rows, evaluate, reporter)
    with lock_folder(folder):
        if resume:
            truncate_metrics(folder, progress.step)
            reporter.message(f"resuming {folder} after step {progress.step}")
        else:
            create_folder(folder, config, model.backend, data=_describe_data(data))
        for line in groups.describe():
            reporter.message(line)
        with (
            closing(MetricsFile(folder)) as metrics,
            _threads(config.train.threads),
            _interruptible() as interrupted,
        ):
            progress = _loop(run, progress, state, metrics, interrupted)
    return progress.step == config.train.steps


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


def _build(config: RunConfig, backend: str) -> LM:
    train = config.train
    dtype = torch.bfloat16 if train.precision == "bfloat16" else None
    device = resolve_device(train.device)
    return build(config.model, backend=backend, device=device, seed=train.seed, dtype=dtype).train()


def _loop(
    run: _Run,
    progress: Progress,
    state: State | None,
    metrics: MetricsFile,
    interrupted: Callable[[], bool],
) -> Progress:
    train, isolate = run.config.train, run.config.data.isolate_documents
    saved, watch = progress.step, RouterWatch()
    for step in range(progress.step + 1, train.steps + 1):
        begin = perf_counter()
        batch, cursor = next(run.rows)
        if run.model.config.objective == "masked":
            batch = hide(
                batch,
                mask_id=run.model.config.vocab_size - 1,
                fraction=run.config.data.mask_fraction,
                seed=run.config.data.seed,
                number=progress.cursor.rows,
            )
        rate = learning_rate(train, step - 1)
        result = train_step(run.model, run.optimizer, batch, train, rate, isolate=isolate, state=state)
        state = result.state
        _wait(run.model)
        elapsed = perf_counter() - begin
        tokens = progress.tokens + batch.ids.size
        progress = Progress(step, tokens, cursor, progress.seconds + elapsed)
        record = step_record(step, tokens, result, rate, progress.seconds, batch.ids.size / elapsed)
        _check_finite(record, saved)
        _report(run, metrics, record)
        for line in watch.check(step, batch.ids.size, result.routers):
            run.reporter.message(line)
        if step % train.eval_every == 0 or step == train.steps:
            _report(run, metrics, eval_record(step, tokens, progress.seconds, run.evaluate(run.model)))
        last = step == train.steps or interrupted()
        if step % train.checkpoint_every == 0 or last:
            save_checkpoint(
                run.folder,
                run.model,
                run.data.tokenizer,
                run.optimizer,
                progress,
                keep=train.keep_checkpoints,
                state=state,
            )
            saved = step
        if last:
            break
    return progress


def _wait(model: LM) -> None:
    """A GPU works on after the call returns; without this its time would be nobody's."""
    device = model.embedding.weight.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _report(run: _Run, metrics: MetricsFile, record: Record) -> None:
    metrics.write(record)
    run.reporter.record(record)


def _check_finite(record: Record, saved: int) -> None:
    for key in ("loss", "grad_norm"):
        if not math.isfinite(record[key]):
            where = f"the checkpoint of step {saved} is good" if saved else "there is no checkpoint yet"
            raise Diverged(
                f"{key} is {record[key]} at step {record['step']}; {where}: lower train.learning_rate, "
                "train.clip_norm or raise train.warmup_fraction"
            )


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
