"""docs/results/state-soup.md with its pictures, from what `run.py` measured.

    python experiments/soup/report.py OUT [OUT ...] --to docs/results

Every figure on the page is computed here from OUT/measured.json.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = dict[str, Any]
GROUPS = {
    "form": "held-out pairs of trained tasks, answers that follow from spelling",
    "fact": "held-out pairs of trained tasks, answers that must be known",
    "made_up": "whole tasks never trained on, made up",
    "unseen": "whole tasks never trained on, real",
}
WAYS = ("sequence", "mean", "norm-kept", "decay", "any-order")


def main() -> None:
    """Write the page and the pictures of every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    pictures = arguments.to / "state-soup"
    pictures.mkdir(parents=True, exist_ok=True)
    runs = [json.loads((out / "measured.json").read_text()) for out in arguments.out]
    parts = [(Path(__file__).parent / "page.md").read_text(), *(section(run, pictures) for run in runs)]
    (arguments.to / "state-soup.md").write_text("\n".join(parts))


def section(run: Row, pictures: Path) -> str:
    """Everything about one run, in Markdown."""
    size = run["size"]
    draw_few_shot(run["few_shot"], pictures / f"{size}-few-shot.png")
    draw_layers(run["retrieval_form"], pictures / f"{size}-layers.png")
    draw_text(run["text"], pictures / f"{size}-text.png")
    lines = [f"## {size.capitalize()}", "", describe(run), ""]
    lines += verdict(run)
    lines += ["", "### Accuracy by number of examples", ""]
    lines += [f"![accuracy](state-soup/{size}-few-shot.png)", ""]
    lines += few_shot_table(run["few_shot"])
    lines += ["", "By task, in per cent (sequence / mean):", "", *task_table(run["few_shot"])]
    lines += ["", "### Retrieval", "", f"![retrieval by layer](state-soup/{size}-layers.png)", ""]
    lines += retrieval_lines(run["retrieval_form"], "Tasks of form and unseen ones")
    lines += retrieval_lines(run["retrieval_all"], "All tasks")
    lines += ["### Text after a state mixed from two halves", "", f"![text](state-soup/{size}-text.png)", ""]
    lines += text_table(run["text"])
    return "\n".join([*lines, ""])


def describe(run: Row) -> str:
    """What was trained, where, for how long."""
    about, train = run["run"], run["run"]["train"]
    kinds = ", ".join(layer["kind"] for layer in about["model"]["pattern"])
    where = sorted({(part["device"], name) for name, part in run["measured"].items()})
    told = ", ".join(f"{name.replace('_', ' ')} on {device}" for device, name in where)
    return (
        f"{about['model']['repeat']} x ({kinds}), d_model {about['model']['d_model']}, "
        f"{about['parameters'] / 1e6:.2f} M parameters, bytes. {about['steps']} of {train['steps']} steps of "
        f"{train['batch_size']} x {about['context']} bytes ({about['tokens'] / 1e6:.1f} MB), "
        f"{train['precision']}, {about['seconds']:.0f} s of training steps on {about['device']} "
        f"({about['backend']}), {about['held_out_bits_per_byte']:.3f} bits a byte on held-out documents. "
        f"Measured in float32: {told}."
    )


def verdict(run: Row) -> list[str]:
    """The three targets, computed; errors are standard errors."""
    rows = run["few_shot"]
    lines = ["| target | measured | reached |", "|---|---|---|"]
    for group in ("form", "fact"):
        for k in (2, 4, 8):
            gap, error = difference(rows, group, k)
            reached = "yes" if gap >= 0 else "within the error" if gap > -error else "no"
            lines.append(
                f"| mean at least as accurate as sequence, k = {k}, {GROUPS[group]} | "
                f"{100 * gap:+.1f} ± {100 * error:.1f} points | {reached} |"
            )
    for name, found in (("form and unseen", run["retrieval_form"]), ("all", run["retrieval_all"])):
        right, total = _count(found, shots=2, chosen=True)
        reached = right >= 0.9 * total
        lines.append(
            f"| right task from 2 shots >= 90 %, {name} tasks | {_share(right, total)} | {_yes(reached)} |"
        )
    for half in sorted({row["half"] for row in run["text"]}):
        by = {row["state"]: row for row in run["text"] if row["half"] == half}
        cells = ", ".join(
            f"{name} {by[name]['over_decay']:+.5f} ± {by[name]['over_decay_standard_error']:.5f}"
            for name in ("mean", "second half only")
        )
        reached = min(
            by[name]["over_decay"] / by[name]["over_decay_standard_error"]
            for name in ("mean", "second half only")
        )
        words = "yes" if reached > 1 else "within the error" if reached > -1 else "no"
        lines.append(f"| decay better than, halves of {half} bytes | nats more: {cells} | {words} |")
    return lines


def difference(rows: Sequence[Row], group: str, k: int) -> tuple[float, float]:
    """Mean less sequence over a group's tasks, each counted alike, and its standard error over draws."""
    gaps: dict[str, list[float]] = defaultdict(list)
    kept = {(r["task"], r["draw"], r["way"]): r for r in rows if r["group"] == group and r["shots"] == k}
    for task, draw, way in kept:
        if way == "mean":
            mean, sequence = kept[task, draw, "mean"], kept[task, draw, "sequence"]
            gaps[task].append((mean["hits"] - sequence["hits"]) / mean["questions"])
    means = [sum(found) / len(found) for found in gaps.values()]
    variance = sum(
        sum((gap - mean) ** 2 for gap in found) / (len(found) - 1) / len(found)
        for mean, found in zip(means, gaps.values(), strict=True)
        if len(found) > 1
    )
    return sum(means) / len(means), math.sqrt(variance) / len(means)


def few_shot_table(rows: Sequence[Row]) -> list[str]:
    """Mean over tasks, in per cent."""
    shots = sorted({row["shots"] for row in rows})
    lines = [f"| tasks | state | {' | '.join(map(str, shots))} |", "|---|---|" + "---|" * len(shots)]
    for group, words in GROUPS.items():
        for way in WAYS:
            cells = [_percent(accuracy(rows, group, way, k)) for k in shots]
            lines.append(f"| {words} | {way} | {' | '.join(cells)} |")
    return lines


def accuracy(rows: Sequence[Row], group: str, way: str, k: int) -> float | None:
    """Mean over the group's tasks of the share of questions answered."""
    tasks: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        if (row["group"], row["way"], row["shots"]) == (group, way, k):
            tasks[row["task"]][0] += row["hits"]
            tasks[row["task"]][1] += row["questions"]
    return sum(hits / asked for hits, asked in tasks.values()) / len(tasks) if tasks else None


def task_table(rows: Sequence[Row]) -> list[str]:
    """Every task by itself."""
    shots = (0, 1, 2, 4, 8, 32)
    lines = [f"| task | group | {' | '.join(map(str, shots))} |", "|---|---|" + "---|" * len(shots)]
    for group, task in dict.fromkeys((row["group"], row["task"]) for row in rows):
        mine = [row | {"group": "one"} for row in rows if row["task"] == task]
        cells: list[str] = []
        for k in shots:
            sequence, mean = accuracy(mine, "one", "sequence", k), accuracy(mine, "one", "mean", k)
            cells.append(_percent(sequence) + (f" / {_percent(mean)}" if mean is not None else ""))
        lines.append(f"| {task} | {group.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def retrieval_lines(found: Row, title: str) -> list[str]:
    """How often the right task comes first."""
    how = "the library's mean subtracted" if found["centre"] else "plain cosine"
    known = len({row["task"] for row in found["results"] if row["known"]})
    lines = [
        f"**{title}**: {len(found['tasks'])} tasks, of which {known} were trained on. Chosen on training "
        f"pairs of those: layers {', '.join(map(str, found['layers']))}, {how}.",
        "",
        "| queries of held-out pairs | 1 shot | 2 shots | 4 shots |",
        "|---|---|---|---|",
    ]
    for words, known_only, chosen in (
        ("trained tasks, chosen layers", True, True),
        ("unseen tasks, chosen layers", False, True),
        ("trained tasks, all layers, plain", True, False),
        ("unseen tasks, all layers, plain", False, False),
    ):
        cells = [_share(*_count(found, shots=k, chosen=chosen, known=known_only)) for k in (1, 2, 4)]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    mistakes: dict[tuple[str, str], int] = defaultdict(int)
    for row in found["results"]:
        if row["shots"] == 2 and _way(row) == _way(found):
            for name in row["picked"]:
                mistakes[row["task"], name] += name != row["task"]
    worst = sorted(mistakes.items(), key=lambda item: -item[1])[:6]
    told = ", ".join(f"{a} as {b} ({n})" for (a, b), n in worst if n)
    return [*lines, "", f"Most frequent mistakes from 2 shots: {told or 'none'}.", ""]


def text_table(rows: Sequence[Row]) -> list[str]:
    """Perplexity, and what each state costs over the full one."""
    halves = sorted({row["half"] for row in rows})
    lines = [
        f"Perplexity a byte of the next {rows[0]['rest']} bytes, {rows[0]['texts']} texts "
        "(nats above the full state ± standard error):",
        "",
        f"| state | {' | '.join(f'halves of {half}' for half in halves)} |",
        "|---|" + "---|" * len(halves),
    ]
    for name in dict.fromkeys(row["state"] for row in rows):
        cells: list[str] = []
        for half in halves:
            row = next(row for row in rows if (row["state"], row["half"]) == (name, half))
            gap = "" if name == "full" else f" ({row['over_full']:+.4f} ± {row['standard_error']:.4f})"
            cells.append(f"{math.exp(row['nats']):.4f}{gap}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw_few_shot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against k, a panel a group."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for place, (group, words) in enumerate(GROUPS.items(), 1):
        axes = figure.add_subplot(1, len(GROUPS), place)
        for way in WAYS:
            points = [
                (k, found)
                for k in (0, 1, 2, 4, 8, 16, 32)
                if (found := accuracy(rows, group, way, k)) is not None
            ]
            axes.plot(
                [_log2(k) for k, _ in points], [100 * y for _, y in points], marker="o", ms=3, label=way
            )
        axes.set_xticks([_log2(k) for k in (0, 1, 2, 4, 8, 16, 32)], ["0", "1", "2", "4", "8", "16", "32"])
        axes.set_title(words.replace(", ", ",\n"), fontsize=7)
        axes.set_xlabel("examples")
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
        if place == 1:
            axes.set_ylabel("answered, %")
            axes.legend(fontsize=7)
    _save(figure, path)


def draw_layers(found: Row, path: Path) -> None:
    """Accuracy of each layer alone, on the training pairs that layers were chosen by."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    for key, words in (("one_shot", "1 shot"), ("two_shot", "2 shots")):
        for centre in (False, True):
            points = [(row["layer"], 100 * row[key]) for row in found["choice"] if row["centre"] == centre]
            label = f"{words}, {'mean subtracted' if centre else 'plain'}"
            axes.plot(*zip(*points, strict=True), "--" if centre else "-", marker="o", ms=3, label=label)
    axes.set_xlabel("layer")
    axes.set_ylabel("right task, % (training pairs)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, path)


def draw_text(rows: Sequence[Row], path: Path) -> None:
    """Nats above the full state against the length of a half."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    for name in ("decay", "any-order", "mean", "sum", "second half only"):
        mine = [row for row in rows if row["state"] == name]
        axes.errorbar(
            [row["half"] for row in mine],
            [row["over_full"] for row in mine],
            [row["standard_error"] for row in mine],
            marker="o",
            ms=3,
            capsize=2,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlabel("bytes in each half")
    axes.set_ylabel("nats a byte above the full state")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, path)


def _count(found: Row, *, shots: int, chosen: bool, known: bool | None = None) -> tuple[int, int]:
    """Right ones and queries, with the chosen layers or with all, of trained tasks, others or both."""
    way = _way(found) if chosen else (False, tuple(found["every"]))
    rows = [row for row in found["results"] if row["shots"] == shots and _way(row) == way]
    rows = [row for row in rows if known is None or row["known"] == known]
    return sum(row["right"] for row in rows), sum(row["queries"] for row in rows)


def _way(row: Row) -> tuple[bool, tuple[int, ...]]:
    return row["centre"], tuple(row["layers"])


def _log2(k: int) -> float:
    return math.log2(k) if k else -1


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _share(right: int, total: int) -> str:
    return f"{100 * right / total:.1f} % of {total}" if total else "none"


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path, dpi=80)


if __name__ == "__main__":
    main()
