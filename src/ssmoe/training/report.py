"""What a finished run shows: loss.png and report.html, self-contained."""

import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ssmoe.config.count import count_parameters, training_flops
from ssmoe.config.load import RunConfig
from ssmoe.training.folder import read_environment, read_run
from ssmoe.training.metrics import Record, read_metrics

PICTURE = "loss.png"
REPORT = "report.html"


class Curve(NamedTuple):
    """Points to draw; `faint` ones stay in the background."""

    name: str
    x: list[float]
    y: list[float]
    faint: bool = False


def write_report(folder: Path) -> list[str]:
    """Write loss.png and report.html into a run folder; return a line about each."""
    run, records = read_run(folder), read_metrics(folder)
    steps = [record for record in records if record["mode"] == "train"]
    evaluations = [record for record in records if record["mode"] == "eval"]
    curves = [
        Curve("training", [r["step"] for r in steps], [r["lm_loss"] for r in steps], faint=True),
        Curve("held out", [r["step"] for r in evaluations], [r["held_out_loss"] for r in evaluations]),
    ]
    drawn = draw_curves(curves, folder / PICTURE, y_label="loss (nats a token)")
    environment = read_environment(folder)
    picture = (folder / PICTURE).read_bytes() if drawn else None
    (folder / REPORT).write_text(_page(run, environment, steps, evaluations, picture))
    lines = [f"report: {folder / REPORT}"]
    return [*lines, f"picture: {folder / PICTURE}"] if drawn else [*lines, _NO_PICTURE]


def draw_curves(curves: Sequence[Curve], path: Path, *, y_label: str, target: float | None = None) -> bool:
    """Loss against step into a PNG; False where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        style: dict[str, Any] = (
            {"linewidth": 0.8, "alpha": 0.45} if curve.faint else {"linewidth": 1.8, "marker": "."}
        )
        axes.plot(curve.x, curve.y, label=curve.name, **style)
    if target is not None:
        axes.axhline(target, color="grey", linestyle=":", linewidth=1)
    # the first steps from a random model would squeeze the rest of the curve
    seen = [
        value
        for curve in curves
        for x, value in zip(curve.x, curve.y, strict=True)
        if x > 0.03 * max(curve.x)
    ]
    if seen:
        axes.set_ylim(min(seen) - 0.1, max(seen) + 0.1)
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


_NO_PICTURE = "no picture: matplotlib is not installed (pip install 'ssmoe[plots]')"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } img { max-width: 100% }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top }
th { font-weight: 600; color: #56606e } pre { background: #f4f6f8; padding: .8rem; overflow: auto }
"""


def _page(
    run: RunConfig,
    environment: dict[str, Any],
    steps: Sequence[Record],
    evaluations: Sequence[Record],
    picture: bytes | None,
) -> str:
    image = (
        f'<img alt="loss" src="data:image/png;base64,{b64encode(picture).decode()}">'
        if picture
        else _NO_PICTURE
    )
    return "\n".join(
        (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(run.name)}</title>',
            f"<style>{_STYLE}</style><h1>{escape(run.name)}</h1><p>{escape(run.description)}</p>",
            _table(_summary(run, environment, steps, evaluations)),
            f"<h2>Loss</h2>{image}",
            "<h2>Held-out evaluations</h2>",
            _table(
                [
                    (
                        f"step {r['step']}",
                        f"{r['held_out_loss']:.4f} nats, {r['held_out_bits_per_byte']:.3f} bits/byte",
                    )
                    for r in evaluations
                ]
            ),
            "<h2>Configuration</h2>",
            f"<pre>{escape(run.model_dump_json(indent=2))}</pre>",
            f"<h2>Environment</h2><pre>{escape(json.dumps(environment, indent=2))}</pre></html>\n",
        )
    )


def _summary(
    run: RunConfig, environment: dict[str, Any], steps: Sequence[Record], evaluations: Sequence[Record]
) -> list[tuple[str, str]]:
    count, last, final = count_parameters(run.model), steps[-1], evaluations[-1]
    flops = training_flops(run.model, run.data.context) * last["tokens"]
    rows = [
        (
            "held-out loss",
            f"{final['held_out_loss']:.4f} nats, {final['held_out_bits_per_byte']:.3f} bits/byte",
        ),
        (
            "parameters",
            f"{count.total:,} total, {count.active:,} active of {count.non_embedding:,} non-embedding",
        ),
        ("trained", f"{last['step']:,} steps, {last['tokens']:,} tokens, {flops:.3g} FLOPs"),
        ("time", f"{last['seconds']:,.0f} s, {last['tokens'] / max(last['seconds'], 1e-3):,.0f} tokens/s"),
        ("device", f"{environment['device']}, backend {environment['backend']}"),
    ]
    if "router" in last:
        router = ", ".join(f"{key} {value:.3g}" for key, value in last["router"].items())
        rows.append(("routers at the last step", router))
    return rows


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows)
    return f"<table>{cells}</table>"
