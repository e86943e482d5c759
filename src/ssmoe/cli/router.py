"""`ssmoe router`: what the routers of a trained model do with text."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ssmoe.cli.arguments import add_json, add_model, load_model, print_json

if TYPE_CHECKING:
    from ssmoe.check.router import RouterReport

HELP = "expert load, entropy and dead experts by layer: table, heat map, tokens by expert"

SHOWN_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN [--rows N] [--text TEXT] [--out FOLDER]"""
    add_model(parser)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows to read (default: 64; 0 is all)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at a time (default: 16)")
    parser.add_argument("--text", help="what to colour by expert (default: the first held-out document)")
    parser.add_argument("--out", type=Path, help="folder for router.png and router.html (default: RUN)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; write router.png (layer x expert) and router.html (tokens coloured by expert)."""
    if arguments.rows < 0 or arguments.batch_size < 1:
        raise ValueError("--rows must be 0 or more and --batch-size 1 or more")
    if arguments.text == "":
        raise ValueError("--text is empty: give some text to colour, or leave it away")
    model, tokenizer = load_model(arguments)

    from ssmoe.check.router import color_tokens, inspect_routers, named_routers, token_choices
    from ssmoe.data.loader import held_out_batches
    from ssmoe.data.prepare import prepare
    from ssmoe.training.folder import find_run, read_run

    if not named_routers(model):
        raise ValueError(f"{arguments.run} has no router: give a run of a model with experts")
    folder = find_run(Path(arguments.run))
    if folder is None:
        raise ValueError(f"{arguments.run} is not in a run folder, whose configuration names the text")
    config = read_run(folder).data
    data = prepare(config, tokenizer=tokenizer)
    batches = held_out_batches(
        data.held_out, context=config.context, batch_size=arguments.batch_size, rows=arguments.rows
    )
    reports = inspect_routers(model, batches, isolate=config.isolate_documents)
    if arguments.text is None:
        ids = [int(token) for token in data.held_out.tokens[:SHOWN_TOKENS]]
    else:
        ids = tokenizer.encode(arguments.text)[:SHOWN_TOKENS]
    out: Path = arguments.out or folder
    out.mkdir(parents=True, exist_ok=True)
    (out / "router.html").write_text(color_tokens(tokenizer, ids, token_choices(model, ids)))
    written = [str(out / "router.html")]
    if draw_loads(reports, out / "router.png"):
        written.append(str(out / "router.png"))
    if arguments.json:
        print_json({"routers": [report._asdict() for report in reports], "written": written})
        return 0
    _print(reports)
    print("written: " + ", ".join(written))
    if len(written) == 1:
        print("no heat map: matplotlib is not installed (pip install 'ssmoe[plots]')")
    return 0


def draw_loads(reports: Sequence["RouterReport"], path: Path) -> bool:
    """Load over mean load, a row a router and a column an expert; False where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widest = max(len(report.load) for report in reports)
    rows = [
        [value * len(report.load) / max(1, sum(report.load)) for value in report.load]
        + [float("nan")] * (widest - len(report.load))
        for report in reports
    ]
    figure = Figure(figsize=(9, 1.2 + 0.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(reports)), [report.name for report in reports])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    figure.colorbar(image, label="load / mean load")
    figure.savefig(path, dpi=120)
    return True


def _print(reports: Sequence["RouterReport"]) -> None:
    titles = ("experts", "max/mean", "dead", "load entropy", "entropy", "confidence", "bias range")
    print(f"{'layer':<12}{''.join(f'{title:>14}' for title in titles)}")
    for report in reports:
        cells = (
            f"{len(report.load)}",
            f"{report.max_over_mean:.2f}",
            f"{report.dead}",
            f"{report.load_entropy:.3f}",
            f"{report.entropy:.3f}",
            f"{report.confidence:.3f}",
            f"{report.bias:.4f}",
        )
        print(f"{report.name:<12}{''.join(f'{cell:>14}' for cell in cells)}")
    worst = max(reports, key=lambda report: report.max_over_mean)
    print(f"worst: layer {worst.name}, max/mean {worst.max_over_mean:.2f}; eval mode, dropless, token choice")
