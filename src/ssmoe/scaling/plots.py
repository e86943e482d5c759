"""Pictures of laws: loss and the best granularity against FLOPs, and a fit with its points."""

from collections.abc import Sequence
from math import log
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ssmoe.scaling.law import Law, loss
from ssmoe.scaling.optimum import best_width, optimum
from ssmoe.scaling.plan import Plan
from ssmoe.scaling.published import DENSE
from ssmoe.scaling.runs import Point


def plot_budgets(law: Law, path: Path, marked: Plan | None = None) -> None:
    """Left: the best loss against FLOPs for several G. Right: the best G against FLOPs. Marks a plan."""
    centre = 1e21 if marked is None else marked.exact.flops
    flops = np.geomspace(centre / 1e4, centre * 1e4, 33).tolist()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _losses(left, law, flops)
    _granularities(right, law, flops)
    if marked is not None:
        left.plot([marked.exact.flops], [marked.loss], "k*", markersize=12, label="the plan")
        right.plot([marked.exact.flops], [marked.shape.granularity], "k*", markersize=12, label="the plan")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("training FLOPs")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"law {law.name}: {law.source}", fontsize="medium")
    _save(figure, path)


def plot_fit(law: Law, points: Sequence[Point], held_out: Sequence[Point], path: Path) -> None:
    """One panel a granularity: the fitted loss against tokens for each N, with the runs."""
    everything = (*points, *held_out)
    grains = sorted({point.granularity for point in everything})
    sizes = sorted({point.parameters for point in everything})
    figure = Figure(figsize=(1.5 + 3.6 * len(grains), 4.2), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(grains), sharey=True, squeeze=False)[0]
    low, high = (limit(point.tokens for point in everything) for limit in (min, max))
    tokens = np.geomspace(low / 1.3, high * 1.3, 60).tolist()
    for axes, grain in zip(panels, grains, strict=True):
        for point_size in _distinct(sizes, [p.parameters for p in everything if p.granularity == grain]):
            colour = _colour(point_size, sizes)
            curve = [loss(law, point_size, each, grain) for each in tokens]
            axes.plot(tokens, curve, color=colour, linewidth=1, label=f"N = {point_size:.2g}")
        for marker, runs in (("o", points), ("*", held_out)):
            here = [point for point in runs if point.granularity == grain]
            colours = [_colour(point.parameters, sizes) for point in here]
            axes.scatter(
                [point.tokens for point in here],
                [point.loss for point in here],
                c=colours,
                marker=marker,
                s=90 if marker == "*" else 25,
                edgecolors="black",
                linewidths=0.5,
                zorder=3,
            )
        axes.set_title(f"G = {grain:g}", fontsize="medium")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    panels[0].set_ylabel("held-out loss (nats)")
    stars = "; stars were held out" if held_out else ""
    figure.suptitle(f"law {law.name}: {law.source}{stars}", fontsize="medium")
    _save(figure, path)


def _losses(axes: Axes, law: Law, flops: Sequence[float]) -> None:
    grains = [grain for grain in (1, 4, 16, 64) if grain in law.granularities]
    for grain in grains:
        axes.plot(flops, [best_width(law, each, grain).loss for each in flops], label=f"G = {grain}")
    if law.blocks == "moe":
        dense = [best_width(DENSE, each, 1).loss for each in flops]
        axes.plot(flops, dense, "--", color="gray", label="dense Transformer")
    axes.set_ylabel("loss (nats)")


def _granularities(axes: Axes, law: Law, flops: Sequence[float]) -> None:
    best = [optimum((law,), each).granularity for each in flops]
    axes.step(flops, best, where="mid", label="best")
    axes.set_yscale("log", base=2)
    axes.set_yticks(sorted(set(best)), [str(grain) for grain in sorted(set(best))])
    axes.set_ylabel("granularity G")


def _distinct(sizes: Sequence[float], present: Sequence[float]) -> list[float]:
    """The sizes present in a panel, in order."""
    return [size for size in sizes if size in present]


def _colour(size: float, sizes: Sequence[float]) -> tuple[float, float, float]:
    """Small models blue, large ones red."""
    span = log(sizes[-1] / sizes[0]) or 1.0
    share = log(size / sizes[0]) / span
    return (0.1 + 0.8 * share, 0.25, 0.9 - 0.8 * share)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
