"""The picture of the headline: loss against tokens and against time, and where the match is."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import Result, final
from speed import FINE, MAMBA

COLOURS = {
    MAMBA: "#333333",
    FINE: "#c23b22",
    "mamba": "#aaaaaa",
    "open": "#e3a857",
    "open-more": "#f0d9a8",
    "transformer": "#4477aa",
    "tmoe": "#66ccee",
}


def draw(runs: Sequence[Result], path: Path) -> None:
    """PNG of the final runs at the most tokens; seeds of one model share a colour."""
    finals = [run for run in runs if run["stage"] == "final" and run["status"] == "done"]
    most = max((run["tokens"] for run in finals), default=0)
    finals = sorted(
        (run for run in finals if run["tokens"] == most), key=lambda run: (final(run), run["seed"])
    )
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, scale, label in (
        (panels[0], 1, 1e-6, "million tokens"),
        (panels[1], 3, 1.0, "seconds of training"),
    ):
        seen: set[str] = set()
        for run in finals:
            rows = run["evaluations"]
            name = run["entry"]
            axes.plot(
                [row[column] * scale for row in rows],
                [row[2] for row in rows],
                label=None if name in seen else name,
                color=COLOURS.get(name),
                linewidth=1.3,
                alpha=0.9,
            )
            seen.add(name)
        targets = [final(run) for run in finals if run["entry"] == MAMBA]
        if targets:
            axes.axhline(min(targets), color=COLOURS[MAMBA], linestyle=":", linewidth=1)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    losses = [row[2] for run in finals for row in run["evaluations"] if row[0] > 0.08 * run["steps"]]
    if losses:
        panels[0].set_ylim(min(losses) - 0.05, max(losses) + 0.05)
    panels[0].set_ylabel("held-out loss, nats a token")
    if finals:
        panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
