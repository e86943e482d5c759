"""`ssmoe fit`: a scaling law's coefficients from runs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ssmoe.cli.extras import require
from ssmoe.scaling import law as laws
from ssmoe.scaling.cost import Blocks
from ssmoe.scaling.runs import Point, common_kind, read_points

if TYPE_CHECKING:
    from ssmoe.scaling.fit import Fit, Intervals

HELP = "scaling-law coefficients with intervals, from runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, the method and what to write."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, or .csv files with columns N,D,G,loss"
    )
    parser.add_argument(
        "--held-out", nargs="+", type=Path, default=[], metavar="RUN", help="runs to predict and not to fit"
    )
    parser.add_argument(
        "--form",
        choices=("fine-grained", "dense"),
        default="fine-grained",
        help="with granularity, or without experts (default: fine-grained)",
    )
    parser.add_argument(
        "--c", default="0.472", metavar="C", help="the irreducible loss, or `free` to fit it (default 0.472)"
    )
    parser.add_argument(
        "--method",
        choices=("paper", "multistart"),
        default="paper",
        help="BFGS from the paper's single start, or the best of 28 starts (default paper)",
    )
    parser.add_argument("--resamples", type=int, default=400, help="of the bootstrap (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture: the fit with its runs")
    parser.add_argument("--output", type=Path, metavar="LAW.json", help="write a law for `ssmoe plan --law`")
    parser.add_argument("--blocks", choices=get_args(Blocks), help="of the models in a .csv, for --output")
    parser.add_argument("--expansion", type=float, metavar="E", help="of the models in a .csv, for --output")
    parser.add_argument("--json", action="store_true", help="print every number as JSON")


def run(args: argparse.Namespace) -> int:
    """Fit, print, and write the law or a picture."""
    require("scipy", "scaling")
    from ssmoe.scaling import intervals
    from ssmoe.scaling.fit import fit, relative_errors, to_law

    points, held_out = read_points(args.runs), read_points(args.held_out)
    blocks, expansion = _kind(args, [*points, *held_out])
    found = fit(points, form=args.form, c=_constant(args.c), method=args.method)
    profile = intervals.profile(found)
    bootstrap = intervals.bootstrap(found, resamples=args.resamples, seed=args.seed)
    errors = relative_errors(found, held_out)
    if args.json:
        print(json.dumps(_as_dict(found, profile, bootstrap, points, held_out, errors), indent=2))
    else:
        print("\n".join(_table(found, profile, bootstrap, held_out, errors)))
    name = "fit" if args.output is None else args.output.stem
    law = to_law(found, points, name=name, blocks=blocks, expansion=expansion, intervals=profile)
    if args.output is not None:
        laws.save(law, args.output)
        print(f"wrote {args.output}; plan with: ssmoe plan --law {args.output} --flops ...", file=sys.stderr)
    if args.plot is not None:
        _plot(law, points, held_out, args.plot)
    return 0


def _kind(args: argparse.Namespace, points: Sequence[Point]) -> tuple[Blocks, float]:
    """What the models are, from the runs or the options; it matters only for a law that is kept."""
    if args.output is None and (args.blocks is not None or args.expansion is not None):
        raise ValueError("--blocks and --expansion belong to --output: name a file, or leave them away")
    if args.expansion is not None and not 1 <= args.expansion < float("inf"):
        raise ValueError(f"--expansion {args.expansion:g}: give a number of at least 1")
    blocks, expansion = common_kind(points)
    blocks, expansion = args.blocks or blocks, args.expansion or expansion
    if args.form == "dense":
        blocks, expansion = blocks or "dense", expansion or 1.0
    if args.output is not None and (blocks is None or expansion is None):
        raise ValueError(
            "a .csv does not say what its models are: give --blocks and --expansion for --output"
        )
    return blocks or "mamba-moe", expansion or 1.0


def _constant(text: str) -> float | None:
    if text == "free":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"--c {text}: give a loss of 0 or more, or free")
    return value


def _table(
    found: "Fit",
    profile: "Intervals",
    bootstrap: "Intervals",
    held_out: Sequence[Point],
    errors: Sequence[float],
) -> list[str]:
    lines = [f"{'coefficient':<12}{'value':>10}{'95 % profile':>24}{'95 % bootstrap':>24}"]
    values = found.coefficients.model_dump()
    for name in found.names:
        cells = (f"{low:.4g} .. {high:.4g}" for low, high in (profile[name], bootstrap[name]))
        lines.append(f"{name:<12}{values[name]:>10.4g}{''.join(f'{cell:>24}' for cell in cells)}")
    if found.fixed_c is not None:
        lines.append(f"{'c':<12}{found.fixed_c:>10.4g}{'fixed':>24}")
    worst = 100 * max(abs(found.residuals))
    lines.append(f"{len(found.residuals)} runs: rms error {found.rmse:.4f} nats, largest {worst:.2f} %")
    for point, error in zip(held_out, errors, strict=True):
        where = f"N = {point.parameters:.3g}, D = {point.tokens:.3g}, G = {point.granularity:g}"
        predicted = f"predicted {point.loss * (1 + error):.4f} ({100 * error:+.2f} %)"
        lines.append(f"held out {point.name}: {where}, loss {point.loss:.4f}, {predicted}")
    if errors:
        mean = sum(abs(error) for error in errors) / len(errors)
        lines.append(f"held-out error: mean {100 * mean:.2f} %, largest {100 * max(map(abs, errors)):.2f} %")
    return lines


def _as_dict(
    found: "Fit",
    profile: "Intervals",
    bootstrap: "Intervals",
    points: Sequence[Point],
    held_out: Sequence[Point],
    errors: Sequence[float],
) -> dict[str, Any]:
    return {
        "form": found.form,
        "c_fixed": found.fixed_c is not None,
        "coefficients": found.coefficients.model_dump(),
        "profile": _finite(profile),
        "bootstrap": _finite(bootstrap),
        "rmse": found.rmse,
        "runs": [
            {**point._asdict(), "log_residual": float(residual)}
            for point, residual in zip(points, found.residuals, strict=True)
        ],
        "held_out": [
            {**point._asdict(), "predicted": point.loss * (1 + error), "relative_error": error}
            for point, error in zip(held_out, errors, strict=True)
        ],
    }


def _finite(intervals: "Intervals") -> dict[str, list[float | None]]:
    """JSON has no infinity: an open end is null."""
    return {name: [end if end < float("inf") else None for end in ends] for name, ends in intervals.items()}


def _plot(law: laws.Law, points: Sequence[Point], held_out: Sequence[Point], path: Path) -> None:
    require("matplotlib", "plots")
    from ssmoe.scaling.plots import plot_fit

    plot_fit(law, points, held_out, path)
    print(f"wrote {path}", file=sys.stderr)
