"""`ssmoe plan`: what to train with a budget, from a scaling law."""

import argparse
import json
import re
import sys
from pathlib import Path

from ssmoe.cli.extras import require
from ssmoe.scaling import law as laws
from ssmoe.scaling import published
from ssmoe.scaling.budget import Budget
from ssmoe.scaling.explain import as_dict, explain, warnings
from ssmoe.scaling.ladder import ladder
from ssmoe.scaling.law import Law
from ssmoe.scaling.plan import Plan, plan
from ssmoe.scaling.preset import write_preset

HELP = "the compute-optimal configuration for a budget, from a scaling law"

LADDER_OPTIONS = ("expansion", "widths", "granularities", "levels", "held_out_levels")
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The budget, its caps, the law and what to write."""
    # argparse before Python 3.14 takes -1e20 for an option, and its error does not show the number
    parser._negative_number_matcher = NEGATIVE_NUMBER  # pyright: ignore[reportPrivateUsage]
    spend = parser.add_argument_group("budget")
    spend.add_argument(
        "--flops", type=float, metavar="F", help="training FLOPs without the head, such as 1e20"
    )
    spend.add_argument("--gpu", metavar="TYPE", help="such as H200; its memory caps the model")
    spend.add_argument("--num-gpus", type=int, default=1, metavar="K", help="default: 1")
    spend.add_argument("--hours", type=float, metavar="H", help="wall-clock on the GPUs, the head included")
    spend.add_argument("--mfu", type=float, metavar="M", help="measured fraction of the peak, such as 0.35")
    caps = parser.add_argument_group("caps")
    caps.add_argument("--params", type=float, metavar="P", help="all parameters, embedding included")
    caps.add_argument("--memory", type=float, metavar="GB", help="for weights, gradients and AdamW")
    caps.add_argument("--tokens", type=float, metavar="D", help="of training text")
    law = parser.add_argument_group("law")
    law.add_argument(
        "--law",
        metavar="LAW",
        help=f"{', '.join(published.NAMES)} or a file of `ssmoe fit --output`; ssm plans MoE-Mamba "
        f"(default {published.MOE_64.name}; for a ladder {published.SSM.name})",
    )
    law.add_argument("--granularity", type=int, metavar="G", help="fix G instead of choosing it")
    run = parser.add_argument_group("run")
    run.add_argument("--vocab-size", type=int, metavar="V", help="of the tokenizer")
    run.add_argument("--context", type=int, metavar="L", help="tokens in a row")
    run.add_argument("--output", type=Path, metavar="FILE.toml", help="write a preset for `ssmoe train`")
    run.add_argument("--plot", type=Path, metavar="FILE", help="picture: loss and best G against FLOPs")
    run.add_argument("--json", action="store_true", help="print every number as JSON")
    steps = parser.add_argument_group("ladder")
    steps.add_argument(
        "--ladder", type=Path, metavar="DIR", help="write a grid of small runs that cost --flops together"
    )
    steps.add_argument("--expansion", type=int, metavar="E", help="of the ladder's experts (default 8)")
    steps.add_argument("--widths", type=int, nargs="+", metavar="D_MODEL", help="(default 64 96 128 192)")
    steps.add_argument(
        "--granularities", type=int, nargs="+", metavar="G", help="(default 1 2 4; 1 without experts)"
    )

    steps.add_argument(
        "--levels", type=float, nargs="+", metavar="X", help="tokens of the runs to fit (default 1 2 4 8)"
    )
    steps.add_argument(
        "--held-out-levels", type=float, nargs="+", metavar="X", help="of the held-out ones (default 4 12)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan, and write its preset or a ladder."""
    if args.ladder is not None:
        return _ladder(args)
    for option in LADDER_OPTIONS:
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} belongs to --ladder DIR")
    candidates = _laws(args.law or published.MOE_64.name)
    budget = Budget(
        flops=args.flops,
        gpu=args.gpu,
        num_gpus=args.num_gpus,
        hours=args.hours,
        mfu=args.mfu,
        max_parameters=args.params,
        memory_gb=args.memory,
        max_tokens=args.tokens,
    )
    made = plan(
        budget,
        candidates,
        granularity=args.granularity,
        vocab_size=args.vocab_size,
        context=1024 if args.context is None else args.context,
        name="plan" if args.output is None else args.output.stem,
    )
    if args.output is not None:
        write_preset(made.run, args.output)
    if args.plot is not None:
        _plot(made, args.plot)
    print(json.dumps(as_dict(made), indent=2) if args.json else "\n".join(explain(made)))
    for line in warnings(made):
        print(f"warning: {line}", file=sys.stderr)
    if args.plot is not None:
        print(f"wrote {args.plot}", file=sys.stderr)
    if args.output is not None:
        print(f"wrote {args.output}; train it with: ssmoe train {args.output}", file=sys.stderr)
    return 0


def _plot(made: Plan, path: Path) -> None:
    require("matplotlib", "plots")
    from ssmoe.scaling.plots import plot_budgets

    plot_budgets(made.law, path, marked=made)


def _ladder(args: argparse.Namespace) -> int:
    """Write DIR/fit-*.toml and DIR/held-out-*.toml."""
    for option in ("gpu", "hours", "mfu", "params", "memory", "tokens", "granularity", "output", "plot"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} does not apply to --ladder: give --flops for all its runs together")
    if args.flops is None:
        raise ValueError("--ladder needs --flops, the compute of all its runs together")
    law = _laws(args.law or published.SSM.name)[0]
    options = (*LADDER_OPTIONS, "vocab_size", "context")
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    made = ladder(args.flops, blocks=law.blocks, **given)
    for each in (*made.fitted, *made.held_out):
        write_preset(each, args.ladder / f"{each.name}.toml")
    steps = sum(each.train.steps for each in (*made.fitted, *made.held_out))
    if args.json:
        print(
            json.dumps({kind: [each.name for each in getattr(made, kind)] for kind in ("fitted", "held_out")})
        )
        return 0
    print(
        f"{args.ladder}: {len(made.fitted)} runs to fit and {len(made.held_out)} larger ones to hold out, "
        f"{steps} steps in all"
    )
    print(f"train: for file in {args.ladder}/*.toml; do ssmoe train $file; done")
    print("fit:   ssmoe fit runs/fit-* --held-out runs/held-out-*")
    return 0


def _laws(name: str) -> tuple[Law, ...]:
    return (laws.load(Path(name)),) if name.endswith(".json") else published.laws(name)
