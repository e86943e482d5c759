"""The numbers and the picture of docs/results/scaling.md, from the two CSV files beside it.

    python experiments/scaling/page.py                      rebuild the page's tables and scaling.png
    python experiments/scaling/page.py --collect RUN ...    write the CSV files from finished runs first
    ... --results DIR                                       in another folder than docs/results

Unfinished runs are passed over. Runs named held-out-* go to scaling-held-out.csv, are predicted and never
fitted. The page's tables stand between marker lines, and only they are replaced.
"""

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean, stdev

import scipy.stats

from ssmoe.config.load import load_run
from ssmoe.scaling.fit import Fit, fit, relative_errors, to_law
from ssmoe.scaling.intervals import bootstrap, profile
from ssmoe.scaling.plots import plot_fit
from ssmoe.scaling.runs import Point, read_csv, read_run

FITTED, HELD_OUT, PAGE, PICTURE = "scaling.csv", "scaling-held-out.csv", "scaling.md", "scaling.png"
COLUMNS = ("name", "N", "D", "G", "E", "loss", "width", "layers", "steps", "learning_rate", "seed")
CONSTANTS: tuple[float | None, ...] = (0.472, 1.0, None)


def main() -> None:
    """Collect, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--collect", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR")
    given = parser.parse_args()
    results: Path = given.results
    if given.collect:
        collect(given.collect, results)
    fitted, held_out = read_csv(results / FITTED), read_csv(results / HELD_OUT)
    joint = [attempt(fitted, c) for c in CONSTANTS]
    alone = {
        g: attempt([p for p in fitted if p.granularity == g], None, form="dense") for g in grains(fitted)
    }
    tables = {
        "fits": fits_table(joint, fitted, held_out),
        "alone": alone_table(alone, held_out),
        "pairs": pairs_table([*fitted, *held_out]),
        "noise": noise_table(fitted),
        "runs": runs_table(joint, fitted, held_out),
    }
    page = results / PAGE
    if page.is_file():
        page.write_text(replace(page.read_text(), tables))
    found = next((found for found in joint if isinstance(found, Fit)), None)
    if found is not None:
        law = to_law(found, fitted, name="ladder", blocks="mamba-moe", expansion=8, intervals={})
        plot_fit(law, fitted, held_out, results / PICTURE)
    print("\n".join(line for lines in tables.values() for line in [*lines, ""]))


def collect(folders: Iterable[Path], results: Path) -> None:
    """Finished runs as rows, in order of name and seed."""
    rows: list[tuple[object, ...]] = []
    for folder in folders:
        run = load_run(str(folder / "config.json"))
        try:
            point = read_run(folder)
        except ValueError as error:
            print(f"passed over: {error}")
            continue
        numbers = (point.parameters, point.tokens, point.granularity, point.expansion, point.loss)
        shape = (run.model.d_model, len(run.model.layers), run.train.steps, run.train.learning_rate)
        rows.append((run.name, *numbers, *shape, run.train.seed))
    rows.sort(key=lambda row: (str(row[0]), str(row[-1])))
    results.mkdir(parents=True, exist_ok=True)
    for name, is_held_out in ((FITTED, False), (HELD_OUT, True)):
        with (results / name).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(row for row in rows if str(row[0]).startswith("held-out") is is_held_out)


def attempt(points: Sequence[Point], c: float | None, form: str = "fine-grained") -> Fit | str:
    """The best fit of many starts, or the reason why there is none."""
    try:
        return fit(points, form="dense" if form == "dense" else "fine-grained", c=c, method="multistart")
    except ValueError as error:
        return str(error)


def fits_table(joint: Sequence[Fit | str], fitted: Sequence[Point], held_out: Sequence[Point]) -> list[str]:
    """One block a value of c."""
    lines: list[str] = []
    for c, found in zip(CONSTANTS, joint, strict=True):
        title = "c free" if c is None else f"c = {c:g} (fixed)"
        lines += [f"**{title}**, {len(fitted)} runs", ""]
        lines += [f"No fit: {found}."] if isinstance(found, str) else coefficients(found, held_out)
        lines += [""]
    return lines[:-1]


def coefficients(found: Fit, held_out: Sequence[Point]) -> list[str]:
    """A row a coefficient, then how well the fit does."""
    lines = ["| coefficient | value | 95 % profile | 95 % bootstrap |", "|---|---|---|---|"]
    values, intervals = found.coefficients.model_dump(), (profile(found), bootstrap(found))
    for name in found.names:
        cells = (f"{low:.3g} to {high:.3g}" for low, high in (each[name] for each in intervals))
        lines.append(f"| {name} | {values[name]:.4g} | {' | '.join(cells)} |")
    errors = relative_errors(found, held_out)
    listed = ", ".join(f"{100 * error:+.2f}" for error in errors)
    worst = 100 * max(abs(found.residuals))
    lines += ["", f"rms error {found.rmse:.4f} nats, largest residual {worst:.2f} %."]
    if errors:
        mean = 100 * fmean(map(abs, errors))
        lines[-1] += f" Held out, predicted less measured: {listed} % (mean size {mean:.2f} %)."
    return lines


def alone_table(alone: dict[float, Fit | str], held_out: Sequence[Point]) -> list[str]:
    """A law of N and D for each granularity."""
    lines = [
        "| G | runs | a | alpha | b | beta | c | rms, nats | held out, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for grain, found in alone.items():
        if isinstance(found, str):
            lines.append(f"| {grain:g} | no fit: {found} | | | | | | | |")
            continue
        values, bounds = found.coefficients.model_dump(), profile(found)
        cells = [f"{values[n]:.3g} ({bounds[n][0]:.2g} to {bounds[n][1]:.2g})" for n in found.names]
        errors = relative_errors(found, [p for p in held_out if p.granularity == grain])
        listed = ", ".join(f"{100 * error:+.2f}" for error in errors) or "none with this G"
        row = [f"{grain:g}", str(len(found.residuals)), *cells, f"{found.rmse:.4f}", listed]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def pairs_table(points: Sequence[Point]) -> list[str]:
    """What a finer granularity does to runs of equal width and tokens; the ratio needs no law."""
    losses = grouped(points)
    lines = ["| G | against | pairs | change of loss, % | 95 % interval |", "|---|---|---|---|---|"]
    steps = [*pairwise(grains(points)), (grains(points)[0], grains(points)[-1])]
    for coarse, fine in steps:
        ratios = [
            log(fmean(losses[shape, tokens, fine]) / fmean(group))
            for (shape, tokens, grain), group in losses.items()
            if grain == coarse and (shape, tokens, fine) in losses
        ]
        mean = fmean(ratios)
        half = stdev(ratios) / sqrt(len(ratios)) * float(scipy.stats.t.ppf(0.975, len(ratios) - 1))
        low, middle, high = (100 * (exp(value) - 1) for value in (mean - half, mean, mean + half))
        lines.append(f"| {fine:g} | {coarse:g} | {len(ratios)} | {middle:+.2f} | {low:+.2f} to {high:+.2f} |")
    return lines


def noise_table(points: Sequence[Point]) -> list[str]:
    """How far equal runs of other initial weights are apart."""
    lines = ["| run | losses | standard deviation, % |", "|---|---|---|"]
    squares, spare = 0.0, 0
    for (name, *_), losses in grouped(points, by_name=True).items():
        if len(losses) > 1:
            logs = [log(loss) for loss in losses]
            squares, spare = squares + stdev(logs) ** 2 * (len(logs) - 1), spare + len(logs) - 1
            listed = ", ".join(f"{loss:.4f}" for loss in losses)
            lines.append(f"| {name} | {listed} | {100 * stdev(logs):.2f} |")
    if not spare:
        return ["No run was repeated."]
    return [*lines, f"| together ({spare} degrees of freedom) | | {100 * sqrt(squares / spare):.2f} |"]


def runs_table(joint: Sequence[Fit | str], fitted: Sequence[Point], held_out: Sequence[Point]) -> list[str]:
    """Every run, with what the first fit that exists leaves of it."""
    found = next((found for found in joint if isinstance(found, Fit)), None)
    left = [""] * len(fitted)
    ahead = [""] * len(held_out)
    if found is not None:
        left = [f"{100 * (exp(-residual) - 1):+.2f}" for residual in found.residuals]
        ahead = [f"{100 * error:+.2f}" for error in relative_errors(found, held_out)]
    lines = ["| run | N | D | G | loss | fit less measured, % |", "|---|---|---|---|---|---|"]
    for point, error in [*zip(fitted, left, strict=True), *zip(held_out, ahead, strict=True)]:
        lines.append(
            f"| {point.name} | {point.parameters / 1e6:.3g} M | {point.tokens / 1e6:.3g} M | "
            f"{point.granularity:g} | {point.loss:.4f} | {error} |"
        )
    return lines


def grains(points: Sequence[Point]) -> list[float]:
    """The granularities, in order."""
    return sorted({point.granularity for point in points})


def grouped(points: Sequence[Point], *, by_name: bool = False) -> dict[tuple[str, float, float], list[float]]:
    """Losses by (shape, tokens, G); the shape is the name without G, or the whole name."""
    groups: dict[tuple[str, float, float], list[float]] = defaultdict(list)
    for point in points:
        shape = point.name if by_name else re.sub(r"-g\d+", "", point.name)
        groups[shape, point.tokens, point.granularity].append(point.loss)
    return groups


def replace(page: str, tables: dict[str, list[str]]) -> str:
    """The page with the lines between each pair of markers replaced."""
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = before + "\n".join([begin, *lines, end]) + after
    return page


if __name__ == "__main__":
    main()
