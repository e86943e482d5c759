"""The State Soup experiment: write the mixture, train on it, measure; `report.py` makes the page.

    python experiments/soup/run.py small OUT --corpus CORPUS         on a CPU
    python experiments/soup/run.py large OUT --corpus CORPUS         on one GPU

CORPUS is a folder with icl/*.json, lists of {"input", "output"}, and text/*.txt.xz. key=value changes the
training run. What OUT already holds (the mixture, a finished run) is not made again.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Model, continued_text, few_shot, retrieval
from mixture import Tasks, documents, load_tasks, read_texts, write
from rich.console import Console

import ssmoe

HERE = Path(__file__).parent
MEGABYTES = {"small": (12, 4), "large": (32, 8)}
"""Of training documents, and of each text file that they are cut from."""


def main() -> None:
    """Do what has not been done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("size", choices=sorted(MEGABYTES))
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=6, help="sets of examples a task")
    parser.add_argument("--questions", type=int, default=32, help="a task and draw")
    parser.add_argument("--queries", type=int, default=40, help="retrieval: a task and number of shots")
    parser.add_argument("--texts", type=int, default=2000, help="for the perplexity after mixed states")
    parser.add_argument("--only", choices=("data", "train", "measure"), action="append")
    parser.add_argument("--device", default="auto", help="of the measurements; the run has train.device")
    arguments = parser.parse_intermixed_args()
    parts = arguments.only or ["data", "train", "measure"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    mixture, run = arguments.out / "mixture.jsonl.xz", arguments.out / "run"
    if "data" in parts and not mixture.exists():
        tasks = load_tasks(arguments.corpus / "icl")
        total, text = MEGABYTES[arguments.size]
        train, _ = read_texts(arguments.corpus / "text", size=text << 20)
        write(mixture, documents(tasks, train, size=total << 20))
    if "train" in parts and not (run / "report.html").exists():
        source = f"data.sources={json.dumps([str(mixture)])}"
        config = ssmoe.load_run(str(HERE / f"{arguments.size}.toml"), [source, *arguments.overrides])
        resume = any(run.glob("checkpoints/step-*"))
        ssmoe.train(config, run, resume=resume, overwrite=run.exists() and not resume, console=Console())
    if "measure" in parts:
        tasks = load_tasks(arguments.corpus / "icl")
        _, held_out = read_texts(arguments.corpus / "text", size=0)
        measure(run, tasks, held_out, arguments)


def measure(run: Path, tasks: Tasks, held_out: list[str], arguments: argparse.Namespace) -> None:
    """Everything about one finished run, written as it comes; what is there already is kept."""
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(*ssmoe.load(run, device=torch.device(device)))
    known = [*tasks.form, *tasks.fact]
    parts: dict[str, Callable[[], Any]] = {
        "few_shot": lambda: few_shot(model, tasks, draws=arguments.draws, questions=arguments.questions),
        "retrieval_form": lambda: retrieval(
            model, [*tasks.form, *tasks.unseen], len(tasks.form), queries=arguments.queries
        ),
        "retrieval_all": lambda: retrieval(
            model, [*known, *tasks.unseen], len(known), queries=arguments.queries
        ),
        "text": lambda: continued_text(
            model, held_out, halves=(8, 16, 32, 64, 128), rest=64, rows=arguments.texts
        ),
    }
    path = arguments.out / "measured.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"measured": {}}
    found |= {"size": arguments.size, "run": _describe(run, model)}
    for name, part in parts.items():
        if name not in found:
            begin = time.perf_counter()
            found[name] = part()
            seconds = time.perf_counter() - begin
            found["measured"][name] = {"device": device, "seconds": seconds}
            Console().print(f"{name}: {seconds:.0f} s")
            path.write_text(json.dumps(found))


def _describe(run: Path, model: Model) -> dict[str, Any]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    last = next(record for record in reversed(records) if record["mode"] == "train")
    evaluated = next(record for record in reversed(records) if record["mode"] == "eval")
    return {
        "parameters": sum(p.numel() for p in model.lm.parameters()),
        "model": config["model"],
        "train": config["train"],
        "context": config["data"]["context"],
        "backend": environment["backend"],
        "device": environment.get("device"),
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "held_out_bits_per_byte": evaluated["held_out_bits_per_byte"],
    }


if __name__ == "__main__":
    main()
