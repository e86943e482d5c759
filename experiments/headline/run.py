"""Train the runs of a stage on one or several GPUs; what is finished is passed over.

    python experiments/headline/run.py STAGE.toml --out RESULTS --corpus FOLDER [--gpus 0,1] [key=value ...]

FOLDER holds text/*.txt.xz and tokenizers/gpt2.json; without --corpus the runs read what their presets say.
Runs with a smaller `priority` are started first, longer ones before shorter ones. With --deadline no run is
started that would not end in time, going by the speed of the runs before it, and one that is under way then
is cut. Each run leaves RESULTS/STAGE/NAME.json and no weights. --dry-run prints the runs and what they cost.
"""

import argparse
import os
import sys
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from time import time
from typing import Any

import corpus
import results
from plan import Stage, Try
from rules import budget_violations, describe, violations
from schedule import Queue

from ssmoe.data.prepare import prepare

SPEED = 500_000.0
"""Tokens a second of a run of which nothing is known, evaluations included."""
TOKENIZER = "tokenizers/gpt2.json"


def main() -> int:
    """1 if a run failed."""
    given = arguments()
    stages = [Stage(path, tuple(given.overrides), given.only) for path in given.stages]
    adapt = _with_corpus if given.corpus else _as_it_is
    tries = [adapt(made) for stage in stages for made in [*stage.tries, *stage.with_recipe(None)]]
    check(tries)
    for stage in stages:
        check_budget(stage)
    deadline = time() + given.deadline if given.deadline else float("inf")
    queue = Queue(
        stages,
        given.out,
        adapt,
        deadline=deadline,
        speed=given.speed,
        dry=given.dry_run,
        known=results.read_all(given.known),
    )
    for made in queue.left:
        tokens = f"{made.tokens / 1e6:.1f}M tokens"
        print(f"{made.stage}/{made.name}: {tokens}, {queue.seconds(made):.0f} s predicted")
        for line in describe(made.config, made.reference):
            print(f"    {line}")
    if given.dry_run or not (queue.left or queue.more_to_come()):
        return 0
    loader, begin = _loader(given, tries[0]), time()
    data = loader[0](*loader[1:])
    counts = f"{data.train.num_tokens:,} tokens to train on, {data.held_out.num_tokens:,} held out"
    print(f"{time() - begin:.1f} s: {counts}", flush=True)
    del data
    gpus = given.gpus or os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    slots = [gpu for gpu in gpus.split(",") for _ in range(given.jobs)]
    failed: list[str] = []
    threads = [Thread(target=work, args=(queue, gpu, loader, failed)) for gpu in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for made in queue.left:
        print(f"{made.stage}/{made.name}: not started, no time left")
    print("\n".join(results.table(results.collect(given.out))))
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stages", nargs="+", type=Path, metavar="STAGE.toml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/ssmoe").expanduser())
    parser.add_argument("--gpus", help='"0,1,2,3" or "cpu"; else those of CUDA_VISIBLE_DEVICES, or the first')
    parser.add_argument("--jobs", type=int, default=1, help="processes a GPU, for small models")
    parser.add_argument("--deadline", type=float, help="seconds from now")
    parser.add_argument("--speed", type=float, default=SPEED, help="tokens/s of a run not seen yet")
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of the runs")
    parser.add_argument("--known", type=Path, help="a file of results, whose runs are not made again")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


def check(tries: list[Try]) -> None:
    """Raise ValueError for a run that breaks the rules and does not say so."""
    for made in tries:
        found = violations(made.config, made.reference)
        if found and not made.one_sided:
            raise ValueError(
                f"{made.name}: {'; '.join(found)} (say one_sided = true to run it out of competition)"
            )


def check_budget(stage: Stage) -> None:
    """Raise ValueError for a search, taken whole, that favours one side."""
    tries = [(made.side, made.config) for made in stage.tries if not made.one_sided]
    if stage.name.startswith("search") and stage.only == "*" and (found := budget_violations(tries)):
        raise ValueError(f"{stage.name}: {found[0]}")


def work(queue: Queue, gpu: str, loader: tuple[Any, ...], failed: list[str]) -> None:
    """One slot: a process on one GPU, started anew after a failure, until no run fits any more."""
    context = get_context("spawn")
    process, connection = None, None
    while (made := queue.take()) is not None:
        if process is None or not process.is_alive():
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, gpu, loader, queue.deadline))
            process.start()
            theirs.close()
        begin, path = time(), queue.path(made)
        status, leaves = _ask(connection, (made, path))
        queue.done(made)
        found = results.read(path)
        loss = results.final(found) if found.get("evaluations") else float("nan")
        speed = found.get("tokens_per_second", 0)
        print(
            f"gpu {gpu}  {made.stage}/{made.name}: {status}, {time() - begin:.1f} s, {speed:,} tokens/s, "
            f"held-out {loss:.4f} {found.get('error', '')}",
            flush=True,
        )
        if status in ("failed", "died"):
            failed.append(made.name)
        if leaves:
            process.join(20)
            process = None
    if process is not None and process.is_alive():
        connection.send(None)
        process.join()


def _serve(connection: Any, gpu: str, loader: tuple[Any, ...], deadline: float) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if gpu == "cpu" else gpu
    # torch is imported in the workers alone, which see one GPU each
    import worker

    worker.serve(connection, loader, deadline)


def _ask(connection: Any, task: object) -> tuple[str, bool]:
    """The worker's answer: how the run ended, and whether the process ends with it."""
    try:
        connection.send(task)
        return connection.recv()
    except (EOFError, OSError):
        return "died", True


def _as_it_is(made: Try) -> Try:
    return made


def _with_corpus(made: Try) -> Try:
    """Says what is read, not where it lies."""
    data = {"sources": ("text",), "tokenizer": TOKENIZER}
    config, reference = (
        each.model_copy(update={"data": each.data.model_copy(update=data)})
        for each in (made.config, made.reference)
    )
    return made._replace(config=config, reference=reference)


def _loader(given: argparse.Namespace, made: Try) -> tuple[Any, ...]:
    """What each worker calls to have the data, cached by the first call."""
    if given.corpus:
        return (corpus.prepare, given.corpus, given.cache, given.corpus / TOKENIZER)
    return (prepare, made.config.data)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
