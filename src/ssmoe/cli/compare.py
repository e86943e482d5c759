"""`ssmoe compare`: several presets side by side on the same batches."""

import argparse
from typing import TYPE_CHECKING

from ssmoe.cli.arguments import (
    OVERRIDES,
    add_json,
    add_run_folder_rules,
    print_json,
    read_run_config,
    split_presets,
)

if TYPE_CHECKING:
    from ssmoe.training.compare import Comparison, Row

HELP = "train several presets and compare steps and time to the same held-out loss"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PRESET PRESET ... [key=value ...] [--baseline NAME] [--out FOLDER] [--resume | --overwrite]"""
    parser.add_argument("words", nargs="+", metavar="PRESET|key=value", help=f"presets or files; {OVERRIDES}")
    parser.add_argument("--baseline", help="the run to be matched (default: the first)")
    parser.add_argument("--out", default="runs/compare", help="folder of the runs (default: runs/compare)")
    add_run_folder_rules(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train all, then print the table."""
    names, overrides = split_presets(arguments.words)
    configs = [read_run_config(name, overrides)[0] for name in names]

    from rich.console import Console

    from ssmoe.api import compare

    comparison = compare(
        configs,
        arguments.out,
        baseline=arguments.baseline,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        console=Console(stderr=arguments.json),
    )
    if arguments.json:
        print_json({**comparison._asdict(), "rows": [row._asdict() for row in comparison.rows]})
    else:
        _print(comparison, arguments.out)
    return 0


def _cells(row: "Row") -> tuple[str, ...]:
    return (
        row.name,
        f"{row.active / 1e6:.2f}M",
        f"{row.total / 1e6:.2f}M",
        f"{row.final_loss:.4f}",
        f"{row.seconds:,.0f}",
        "never" if row.match_step is None else f"{row.match_step:,}",
        "-" if row.steps_ratio is None else f"{row.steps_ratio:.2f}x",
        "-" if row.seconds_ratio is None else f"{row.seconds_ratio:.2f}x",
    )


def _print(comparison: "Comparison", folder: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    titles = ("run", "active", "total", "final loss", "seconds", "steps to match", "fewer steps", "less time")
    rows = [_cells(row) for row in comparison.rows]
    console = Console()
    # titles are wrapped between words, numbers never, names where the page is too narrow for them
    widths = [
        max(len(part) for part in (*title.split(), *cells))
        for title, *cells in zip(titles, *rows, strict=True)
    ]
    widths[0] = max(8, min(widths[0], console.width - sum(widths[1:]) - 2 * len(titles)))
    aim = f"to the final held-out loss of {comparison.baseline}, {comparison.target:.4f}"
    table = Table(title=aim, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title, width in zip(titles, widths, strict=True):
        table.add_column(title, justify="left" if title == "run" else "right", overflow="fold", width=width)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for row in comparison.rows:
        if row.name != comparison.baseline and row.steps_ratio and row.seconds_ratio:
            line = (
                f"{row.name} reaches the final loss of {comparison.baseline} in "
                f"{_ratio(row.steps_ratio, 'fewer steps', 'the steps')} and "
                f"{_ratio(row.seconds_ratio, 'less time', 'the time')}"
            )
            console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written to {folder}: compare.json and, with matplotlib, compare.png", highlight=False)


def _ratio(ratio: float, better: str, worse: str) -> str:
    return f"{ratio:.2f} times {better}" if ratio >= 1 else f"{1 / ratio:.2f} times {worse}"
