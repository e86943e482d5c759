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
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from threading import Condition, Thread
from time import time
from typing import Any

import corpus
import results
from plan import Try, read_stage
from rules import describe, violations

from ssmoe.config.load import RunConfig
from ssmoe.data.prepare import prepare

SPEED = 500_000.0
"""Tokens a second of a run of which nothing is known, evaluations included."""
TOKENIZER = "tokenizers/gpt2.json"
OVERHEAD = 12.0
"""Seconds a run takes before its first step."""


class Queue:
    """Hands out runs and learns how fast they are."""

    def __init__(self, tries: list[Try], deadline: float, speed: float) -> None:
        self.left = sorted(tries, key=lambda made: (made.priority, -made.tokens))
        self.deadline, self.speed = deadline, speed
        self.speeds: dict[str, float] = {}
        self.failed: list[str] = []
        self.changed = Condition()

    def take(self) -> Try | None:
        """The first run that would end before the deadline; None if there is none."""
        with self.changed:
            for made in self.left:
                if time() + self.seconds(made) <= self.deadline:
                    self.left.remove(made)
                    return made
        return None

    def seconds(self, made: Try) -> float:
        """Predicted time of a run."""
        return OVERHEAD + made.tokens / self.speeds.get(shape(made), self.speed)

    def learn(self, made: Try, path: Path) -> None:
        """Note the speed of a finished run: training and evaluations, not what comes before them."""
        found = results.read(path)
        if found.get("status") == "done":
            occupied = found["occupied_seconds"] - OVERHEAD / 2
            with self.changed:
                self.speeds[shape(made)] = made.tokens / max(occupied, found["seconds"])


def shape(made: Try) -> str:
    """Runs of equal speed."""
    return made.config.model.model_dump_json(exclude={"init"})


def main() -> int:
    """1 if a run failed."""
    given = arguments()
    tries = [made for path in given.stages for made in read_stage(path, tuple(given.overrides))]
    tries = [made for made in tries if fnmatch(made.name, given.only)]
    if given.corpus:
        tries = [
            made._replace(config=_with_corpus(made.config), reference=_with_corpus(made.reference))
            for made in tries
        ]
    check(tries)
    tries = [made for made in tries if not results.finished(_path(given.out, made), made.config)]
    deadline = time() + given.deadline if given.deadline else float("inf")
    queue = Queue(tries, deadline, given.speed)
    for made in queue.left:
        print(f"{made.stage}/{made.name}: {made.tokens / 1e6:.1f}M tokens, {queue.seconds(made):.0f} s predicted")
        for line in describe(made.config, made.reference):
            print(f"    {line}")
    if given.dry_run or not queue.left:
        return 0
    loader = _loader(given, queue.left[0])
    begin = time()
    data = loader[0](*loader[1:])
    print(f"{time() - begin:.1f} s: {data.train.num_tokens:,} tokens to train on, {data.held_out.num_tokens:,} held out", flush=True)
    del data
    gpus = given.gpus or os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    slots = [gpu for gpu in gpus.split(",") for _ in range(given.jobs)]
    threads = [Thread(target=work, args=(queue, gpu, given.out, loader)) for gpu in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for made in queue.left:
        print(f"{made.stage}/{made.name}: not started, no time left")
    print("\n".join(results.table(results.collect(given.out))))
    return 1 if queue.failed else 0


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
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


def check(tries: list[Try]) -> None:
    """Raise ValueError for a run that breaks the rules and does not say so."""
    for made in tries:
        found = violations(made.config, made.reference)
        if found and not made.one_sided:
            raise ValueError(f"{made.name}: {'; '.join(found)} (say one_sided = true to run it out of competition)")


def work(queue: Queue, gpu: str, out: Path, loader: tuple[Any, ...]) -> None:
    """One slot: a process on one GPU, started anew after a failure, until no run fits any more."""
    context = get_context("spawn")
    process, connection = None, None
    while (made := queue.take()) is not None:
        if process is None or not process.is_alive():
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, gpu, loader, queue.deadline))
            process.start()
            theirs.close()
        begin, path = time(), _path(out, made)
        status = _ask(connection, (made, path))
        queue.learn(made, path)
        found = results.read(path)
        loss = found["evaluations"][-1][2] if found.get("evaluations") else float("nan")
        speed = found.get("tokens_per_second", 0)
        print(
            f"gpu {gpu}  {made.stage}/{made.name}: {status}, {time() - begin:.1f} s, {speed:,} tokens/s, "
            f"held-out {loss:.4f} {found.get('error', '')}",
            flush=True,
        )
        if status in ("failed", "died"):
            queue.failed.append(made.name)
            process.join(20)
            process = None
    if process is not None and process.is_alive():
        connection.send(None)
        process.join()


def _serve(*given: Any) -> None:
    # torch is imported in the workers alone
    import worker

    worker.serve(*given)


def _ask(connection: Any, task: object) -> str:
    try:
        connection.send(task)
        return connection.recv()
    except (EOFError, OSError):
        return "died"


def _path(out: Path, made: Try) -> Path:
    return out / made.stage / f"{made.name}.json"


def _with_corpus(config: RunConfig) -> RunConfig:
    """Says what is read, not where it lies."""
    data = config.data.model_copy(update={"sources": ("text",), "tokenizer": TOKENIZER})
    return config.model_copy(update={"data": data})


def _loader(given: argparse.Namespace, made: Try) -> tuple[Any, ...]:
    """What each worker calls to have the data, cached by the first call."""
    if given.corpus:
        return (corpus.prepare, given.corpus, given.cache, given.corpus / TOKENIZER)
    return (prepare, made.config.data)

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
