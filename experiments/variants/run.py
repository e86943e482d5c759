"""Train every variant's preset for 200 steps and let it generate: the table of docs/results/variants.md.

    python experiments/variants/run.py [PRESET ...] [--out runs/variants] [--threads N] [--page FILE.md]

Each `*-tiny` preset, but the tuned two that `make compare` trains, and the demo is trained as it is, on its
own text (the standard library's sources), with only train.steps=200 changed. A loss falls when the mean of
the last ten steps is below 0.8 of the mean of the first ten, one limit for all presets. Each model then
generates, or refuses and names the fix; where the fix is to train on as token choice, that is done for 20
steps and the result generates.

A preset that is in OUT/results.jsonl already is not trained again. --page puts the table between the marker
lines of a page. Ends with 1 if any variant fell short.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ssmoe

STEPS, EDGE, LIMIT = 200, 10, 0.8
TRANSITION_STEPS = 20
PROMPT = "def read_lines(path):\n"
NEW_TOKENS = 24
BEGIN, END = "<!-- table -->", "<!-- end of table -->"

Row = dict[str, Any]


def main() -> int:
    """Train what is missing, then print the table."""
    names = [name for name in ssmoe.preset_names() if name.endswith("-tiny") and "-tuned-" not in name]
    names.append("demo")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=f"(default: {' '.join(names)})")
    parser.add_argument("--out", type=Path, default=Path("runs/variants"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run (default 1)")
    parser.add_argument("--page", type=Path, metavar="FILE.md")
    given = parser.parse_intermixed_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results = given.out / "results.jsonl"
    # each in a process of its own, so that none pays for the memory of those before it
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in given.presets or names:
            if name not in read(results):
                row = pool.submit(variant, name, given.out / name, given.threads).result()
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    rows = [row for name, row in read(results).items() if name in (given.presets or names)]
    print("\n".join(table(rows)))
    if given.page is not None:
        before, _, rest = given.page.read_text().partition(BEGIN)
        given.page.write_text("\n".join([before + BEGIN, *table(rows), END]) + rest.partition(END)[2])
    return 0 if all(row["ratio"] < LIMIT and row["ends_well"] for row in rows) else 1


def variant(name: str, folder: Path, threads: int) -> Row:
    """One preset, trained and asked for text."""
    run = ssmoe.preset(name, [*cadence(STEPS), f"train.threads={threads}", "train.device=cpu"])
    ssmoe.train(run, folder, overwrite=folder.exists())
    losses = train_losses(folder)
    first, last = sum(losses[:EDGE]) / EDGE, sum(losses[-EDGE:]) / EDGE
    row: Row = {"preset": name, "first": first, "last": last, "ratio": last / first}
    reason = run.model.why_no_generation()
    if reason is None:
        return row | {"ends_well": True, "generation": generate(folder)}
    refusal = refused(folder)
    row |= {"ends_well": reason in refusal, "generation": f"refuses: {refusal}"}
    kinds = {layer.kind for layer in run.model.pattern} & {"mot", "expert_choice"}
    if run.model.objective == "masked" or not kinds:
        return row
    return row | {"after_the_fix": transition(name, folder, kinds.pop(), threads)}


def cadence(steps: int) -> list[str]:
    """The number of steps, and one evaluation and checkpoint after the last, which change no step."""
    return [f"train.steps={steps}", f"train.eval_every={steps}", f"train.checkpoint_every={steps}"]


def transition(name: str, folder: Path, kind: str, threads: int) -> str:
    """Train on as token choice, as the refusal says, and generate."""
    changes = [
        f"train.init_from={folder}",
        f"model.pattern.{kind}.mode=token_choice",
        f"train.threads={threads}",
    ]
    run = ssmoe.preset(name, [*cadence(TRANSITION_STEPS), *changes, "train.device=cpu"])
    tuned = folder.with_name(f"{folder.name}-token-choice")
    ssmoe.train(run, tuned, overwrite=tuned.exists())
    return generate(tuned)


def generate(folder: Path) -> str:
    """What the model says after the prompt, without sampling."""
    done = ssmoe.generate(*ssmoe.load(folder), [PROMPT], max_new_tokens=NEW_TOKENS, temperature=0)
    return done.texts[0]


def refused(folder: Path) -> str:
    """The refusal; empty if there was none."""
    try:
        generate(folder)
    except ValueError as error:
        return str(error)
    return ""


def train_losses(folder: Path) -> list[float]:
    """lm_loss of every step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["lm_loss"] for line in lines if line["mode"] == "train"]


def read(results: Path) -> dict[str, Row]:
    """Rows by preset."""
    lines = results.read_text().splitlines() if results.is_file() else []
    return {row["preset"]: row for row in map(json.loads, lines)}


def table(rows: list[Row]) -> list[str]:
    """Markdown."""
    lines = ["| preset | loss, first ten steps | last ten | ratio | generation |", "|---|---|---|---|---|"]
    for row in rows:
        text = row["generation"] if row["generation"].startswith("refuses") else f"`{row['generation']!r}`"
        if "after_the_fix" in row:
            text += f"; after the fix: `{row['after_the_fix']!r}`"
        text = text.replace("|", "\\|")
        lines.append(
            f"| {row['preset']} | {row['first']:.3f} | {row['last']:.3f} | {row['ratio']:.3f} | {text} |"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
