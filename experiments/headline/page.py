"""docs/results/headline.md, its picture and README's headline, from the results of runs.

    python experiments/headline/page.py                        rebuild all from docs/results/headline.json
    python experiments/headline/page.py --collect RESULTS ...  put finished runs into that file first

Stages named "final" make the headline; all others are the search. Tables stand between marker lines, and only
what is between them is replaced.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import speed
from curves import draw
from prose import (
    PAPERS_RATIO,
    attention_table,
    by_name,
    growth_text,
    muon_text,
    paper_text,
    screens_text,
    seeds_text,
    why_text,
)
from results import LAST, Match, Result, collect, final, match, of, pairs, read_all
from rules import pair_violations
from speed import FINE, MAMBA, PLAIN

from ssmoe.config.load import RunConfig

ROOT = Path(__file__).parents[2]
DATA, PAGE, PICTURE, INFERENCE = "headline.json", "headline.md", "headline.png", "inference.json"
PAPERS = "the paper's"
GROWTH = (
    (
        "first search (untied, cosine, weights that add up to one)",
        ("search/fine-muon-lr0.008", "search/mamba-muon-lr0.008"),
        ("search/fine-muon-lr0.008-100m", "search/mamba-muon-lr0.008-100m"),
    ),
    (
        "tuned",
        ("final/hybrid-s0-18m", "final/mamba-hybrid-s0-18m"),
        ("final/hybrid-s0-50m", "final/mamba-hybrid-s0-50m"),
        ("final/hybrid-s0", "final/mamba-hybrid-s0"),
    ),
    (
        "without attention on either side",
        ("final/open-s0-18m", "final/mamba-s0-18m"),
        ("final/open-s0-50m", "final/mamba-s0-50m"),
        ("final/open-s0", "final/mamba-s0"),
    ),
    (
        "without attention on either side, 256 experts",
        ("final/open-more-s0-18m", "final/mamba-s0-18m"),
        ("final/open-more-s0", "final/mamba-s0"),
    ),
    (f"{PAPERS}, half of the text", ("pilot/paper-lr0.001", "pilot/mamba-lr0.002")),
    (
        PAPERS,
        ("paper/paper-25m", "paper/paper-mamba-25m"),
        ("paper/paper-50m", "paper/paper-mamba-50m"),
        ("paper/paper-100m", "paper/paper-mamba-100m"),
    ),
)
"""Pairs of runs of different lengths: MoE-Mamba and the best Mamba of the same recipe."""
DROPPED = ("columns", "trace", "last_message", "raw_seconds", "overrides")


def main() -> None:
    """Collect, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--collect", nargs="+", type=Path, metavar="RESULTS")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    given = parser.parse_args()
    if given.collect:
        known = read_all(given.results / DATA) if (given.results / DATA).is_file() else []
        found = [shorten(run) for folder in given.collect for run in collect(folder)]
        write(given.results / DATA, [*known, *found])
    runs = read_all(given.results / DATA)
    page = given.results / PAGE
    blocks = tables(runs, inference(given.results))
    page.write_text(replace(page.read_text() if page.is_file() else SKELETON, blocks))
    if given.readme.is_file():
        given.readme.write_text(replace(given.readme.read_text(), {"headline": for_readme(runs)}))
    draw(runs, given.results / PICTURE)
    print("\n".join(headline(runs)))


def inference(folder: Path) -> list[dict[str, Any]]:
    """What was measured of the speed, a device each; nothing where nothing was."""
    path = folder / INFERENCE
    return json.loads(path.read_text()) if path.is_file() else []


def shorten(run: Result) -> Result:
    """What the page needs, and the configuration that makes the run again."""
    kept = {key: value for key, value in run.items() if key not in DROPPED}
    environment = run.get("environment", {})
    kept["environment"] = {
        "device": environment.get("device"),
        "torch": environment.get("versions", {}).get("torch"),
        "git": environment.get("git"),
        "train_tokens": environment.get("data", {}).get("train_tokens"),
    }
    return kept


def write(path: Path, runs: Sequence[Result]) -> None:
    """JSON, a line a run, in order of stage and name; the last of two runs of one name is kept."""
    unique = {(run["stage"], run["name"]): run for run in runs}
    lines = ",\n".join(json.dumps(unique[key]) for key in sorted(unique))
    path.write_text(f"[\n{lines}\n]\n")


def tables(runs: Sequence[Result], measured: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Everything that stands between markers on the page. measured: what `inference.py` wrote."""
    return {
        "headline": headline(runs),
        "seeds": seeds_table(runs),
        "models": models_table(runs),
        "attention": attention_table(runs),
        "growth": growth_table(runs),
        "why": why(runs),
        "speed": speed.tables(measured, runs),
        "rules": rules(runs),
        "search": search_table(runs),
        "cost": cost(runs),
    }


def headline(runs: Sequence[Result]) -> list[str]:
    """Two or three sentences with the figures."""
    found = pairs(runs, FINE, MAMBA)
    reached = [each for run, baseline in found if (each := match(run, baseline))]
    if not found:
        return ["The final runs are not there yet."]
    run, baseline = found[0]
    tokens = f"{run['tokens'] / 1e6:.0f} M tokens"
    if len(reached) < len(found):
        return [
            f"At {tokens} MoE-Mamba reached the tuned Mamba's final loss with {len(reached)} of "
            f"{len(found)} seeds."
        ]
    steps = spread([each.fewer_steps for each in reached])
    time = f"{spread([each.less_time for each in reached])} times less time"
    losses = f"{fmean(final(b) for _, b in found):.3f} against {fmean(final(a) for a, _ in found):.3f} nats"
    return [
        f"**MoE-Mamba reaches the tuned Mamba's final held-out loss in {steps} times fewer steps and "
        f"{time}** on the same GPU: {tokens}, {run['active'] / 1e6:.1f} M and "
        f"{baseline['active'] / 1e6:.1f} M active parameters, {len(found)} "
        f"{'seed' if len(found) == 1 else 'seeds'}, {losses} at the end, {run['environment']['device']}.",
        *cut_text(runs),
        *plain_text(runs),
    ]


def cut_text(runs: Sequence[Result]) -> list[str]:
    """Runs of the winner that were stopped before their end but after their match, each beside the Mamba of
    its seed; they are in no mean."""
    lines: list[str] = []
    mine = [run for run in runs if run["stage"] == "final" and run["entry"] == FINE]
    for run in (run for run in mine if run["status"] in ("cut", "running")):
        baseline = next(
            (each for each in of(runs, MAMBA, run["tokens"]) if each["seed"] == run["seed"]), None
        )
        if baseline and (found := match(run, baseline)):
            lines.append(
                f"A pair with seed {run['seed']} is not counted, since MoE-Mamba's run was cut at step "
                f"{run['evaluations'][-1][0]} of {run['steps']}: it had matched {final(baseline):.3f} at "
                f"step {found.step}, {found.fewer_steps:.2f} times fewer steps and {found.less_time:.2f} "
                "times less time."
            )
    return lines


def plain_text(runs: Sequence[Result]) -> list[str]:
    """The ratio of the pair without attention layers; nothing where it was not run."""
    found = [match(run, baseline) for run, baseline in pairs(runs, *PLAIN)]
    reached = [each for each in found if each]
    if not reached or len(reached) < len(found):
        return []
    steps, time = (spread([getattr(each, key) for each in reached]) for key in ("fewer_steps", "less_time"))
    return [
        f"Both have attention layers, which need no experts; without them on either side it is {steps} times "
        f"fewer steps and {time} times less time."
    ]


def for_readme(runs: Sequence[Result]) -> list[str]:
    """The headline, and where the rest is."""
    return [
        *headline(runs),
        f"The paper's {PAPERS_RATIO} times is of 31 billion tokens; what this size allows, every run and the "
        "commands are in [docs/results/headline.md](docs/results/headline.md).",
    ]


def spread(values: Sequence[float]) -> str:
    """The mean, and the range where there are several."""
    mean, low, high = (f"{value:.2f}" for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def seeds_table(runs: Sequence[Result]) -> list[str]:
    """Of the pair, then of the pair without attention layers."""
    lines = [*seeds_of(pairs(runs, FINE, MAMBA)), *(["", *cut] if (cut := cut_text(runs)) else [])]
    if plain := pairs(runs, *PLAIN):
        lines += ["", "Without attention layers on either side:", "", *seeds_of(plain)]
    return lines


def seeds_of(found: Sequence[tuple[Result, Result]]) -> list[str]:
    """A row a seed, then mean and standard deviation."""
    lines = [
        seeds_text(found),
        "",
        "| seed | Mamba, final loss | MoE-Mamba, final loss | matched at | of | fewer steps | less time "
        "| fewer steps, last weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows: list[tuple[Result, Result, Match | None, Match | None]] = [
        (run, baseline, match(run, baseline), match(run, baseline, LAST) if _has_last(run) else None)
        for run, baseline in found
    ]
    for run, baseline, matched, last in rows:
        losses = f"{final(baseline):.4f} | {final(run):.4f}"
        ratio = f"{last.fewer_steps:.2f}" if last else "-"
        cells = _cells(matched, run["steps"])
        lines.append(f"| {run['seed']} | {losses} | {cells} | {ratio} |")
    reached = [matched for _, _, matched, _ in rows if matched]
    if len(rows) > 1 and len(reached) == len(rows):
        columns = (
            [final(baseline) for _, baseline, _, _ in rows],
            [final(run) for run, *_ in rows],
            [each.fewer_steps for each in reached],
            [each.less_time for each in reached],
        )
        cells = [f"{fmean(values):.3f} ± {stdev(values):.3f}" for values in columns]
        lines.append(f"| mean ± sd | {cells[0]} | {cells[1]} | | | {cells[2]} | {cells[3]} | |")
    return lines


def _has_last(run: Result) -> bool:
    return all(len(row) > LAST and row[LAST] is not None for row in run["evaluations"])


def models_table(runs: Sequence[Result]) -> list[str]:
    """Every kind of model of the final stage, seed 0, beside the tuned Mamba of as many tokens."""
    lines = [
        "| model | parameters, active of all (non-embedding) | tokens | learning rate | final loss "
        "| tokens/s | matched at | of | fewer steps | less time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    mine = [run for run in runs if run["stage"] == "final" and run["status"] == "done" and run["seed"] == 0]
    for run in sorted(mine, key=lambda run: (-run["tokens"], final(run))):
        baseline = next(iter(of(runs, MAMBA, run["tokens"])), None)
        found = match(run, baseline) if baseline else None
        size = f"{run['active'] / 1e6:.1f} M of {run['non_embedding'] / 1e6:.0f} M"
        name = run["entry"] + (" (one-sided)" if run["one_sided"] else "")
        lines.append(
            f"| {name} | {size} | {run['tokens'] / 1e6:.0f} M | {run['learning_rate']:g} "
            f"| {final(run):.4f} | {run['tokens_per_second']:,} "
            f"| {_cells(found, run['steps'])} |"
        )
    return lines


def grown(runs: Sequence[Result]) -> dict[str, list[tuple[Result, Result]]]:
    """The pairs of GROWTH that have been run, by recipe."""
    known = by_name(runs)
    return {
        title: [(known[run], known[other]) for run, other in names if run in known and other in known]
        for title, *names in GROWTH
    }


def growth_table(runs: Sequence[Result]) -> list[str]:
    """Speed-up of separate runs planned for different numbers of tokens."""
    found = grown(runs)
    matches = [(run["tokens"], match(run, baseline)) for run, baseline in found["tuned"]]
    lines = [
        f"{growth_text('tuned', matches)} {paper_text(found[PAPERS])}",
        "",
        "| recipe | tokens | Mamba | MoE-Mamba | matched at | of | fewer steps | less time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, found in grown(runs).items():
        for run, baseline in found:
            losses = f"{final(baseline):.4f} | {final(run):.4f}"
            cells = _cells(match(run, baseline), run["steps"])
            lines.append(f"| {title} | {run['tokens'] / 1e6:.0f} M | {losses} | {cells} |")
    return lines


def why(runs: Sequence[Result]) -> list[str]:
    """How far ahead a model would have to be for the paper's figure, and what the optimiser did."""
    return [f"{why_text(*(of_any_length(runs, entry) for entry in (MAMBA, FINE)))} {muon_text(runs)}"]


def of_any_length(runs: Sequence[Result], entry: str) -> list[Result]:
    """The finished runs of an entry of the final stage with seed 0."""
    return [
        run
        for run in runs
        if run["stage"] == "final" and run["entry"] == entry and run["status"] == "done" and run["seed"] == 0
    ]


def rules(runs: Sequence[Result]) -> list[str]:
    """In what the two sides of the headline differ, as the command printed it."""
    if not (found := pairs(runs, FINE, MAMBA)):
        return ["No pair yet."]
    run, baseline = found[0]
    lines = [f"  Mamba: {line}" for line in baseline["differs"]] + [
        f"  MoE-Mamba: {line}" for line in run["differs"]
    ]
    uneven = pair_violations(*(RunConfig.model_validate(each["configuration"]) for each in (run, baseline)))
    broken = [f"  breaks the rules: {line}" for line in [*run["breaks"], *baseline["breaks"], *uneven]]
    return ["```", "against the preset mamba-25m with the settings of both sides", *lines, *broken, "```"]


def search_table(runs: Sequence[Result]) -> list[str]:
    """Every run of the search, by stage and final loss."""
    lines = [
        screens_text(runs),
        "",
        "| stage | side | run | learning rate | tokens | final loss | what |",
        "|---|---|---|---|---|---|---|",
    ]
    others = [run for run in runs if run["stage"] != "final" and run["evaluations"]]
    for run in sorted(others, key=lambda run: (run["stage"], run["tokens"], run["side"], final(run))):
        loss = f"{final(run):.4f}" if run["status"] == "done" else run["status"]
        what = f"{run['note'] or run['entry']}{', recipe ' + run['recipe'] if run['recipe'] else ''}"
        lines.append(
            f"| {run['stage']} | {run['side']} | {run['entry']} | {run['learning_rate']:g} "
            f"| {run['tokens'] / 1e6:.0f} M | {loss} | {what} |"
        )
    return lines


def cost(runs: Sequence[Result]) -> list[str]:
    """GPU minutes by stage and side, devices and dates."""
    keys = sorted({(run["stage"], run["side"]) for run in runs})
    lines = ["| stage | side | runs | GPU minutes | device | torch | date |", "|---|---|---|---|---|---|---|"]
    for stage, side in keys:
        mine = [run for run in runs if (run["stage"], run["side"]) == (stage, side) and not run.get("run_as")]
        minutes = sum(run.get("occupied_seconds", run.get("seconds", 0.0)) for run in mine) / 60
        known = [run["environment"] for run in mine if run["environment"]["device"]]
        cells = (", ".join(sorted({str(each[key]) for each in known})) for key in ("device", "torch"))
        dates = sorted(run["date"][:10] for run in mine)
        if mine:
            lines.append(
                f"| {stage} | {side} | {len(mine)} | {minutes:.1f} | {' | '.join(cells)} | {dates[-1]} |"
            )
    return lines


def _cells(found: Match | None, steps: int) -> str:
    if found is None:
        return f"never | {steps} | - | -"
    return f"{found.step} | {steps} | {found.fewer_steps:.2f} | {found.less_time:.2f}"


def replace(text: str, blocks: dict[str, list[str]]) -> str:
    """The text with what is between each pair of markers replaced; a marker that is missing is an error."""
    for name, lines in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the text needs the lines {begin} and {end} once each")
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + "\n".join([begin, *lines, end]) + after
    return text


SKELETON = "# MoE-Mamba against Mamba\n\n" + "\n\n".join(
    f"## {title}\n\n<!-- {name} -->\n<!-- end of {name} -->"
    for name, title in (
        ("headline", "In short"),
        ("seeds", "Seeds"),
        ("models", "All models"),
        ("attention", "What attention does"),
        ("growth", "Speed-up against tokens"),
        ("why", "Why not more"),
        ("speed", "Inference speed at equal quality"),
        ("rules", "In what the two sides differ"),
        ("search", "The search"),
        ("cost", "Cost"),
    )
)

if __name__ == "__main__":
    main()
