"""Do the GPU's kernels learn what the definitions learn? Loss curves of dropless moe-mamba-25m, side by side.

    python experiments/loss_curves/run.py backends  [--out runs/curves] [key=value ...]
    python experiments/loss_curves/run.py precision [--out runs/curves] [key=value ...]
    python experiments/loss_curves/run.py page      [--out docs/results/loss_curves]

backends: 30 steps of 4 x 256 tokens in float32, once with the device's own kernels, once with the reference
backend. The same seed and batches, so that only rounding differs: every step's loss must agree to 2e-3 nats.
(A token near a router's tie may change its expert by rounding, which no bound on one product covers.)

precision: 300 steps of 64 x 1024 tokens, the device's kernels, in bfloat16 with three seeds and in float32
with the first of them. The float32 loss, averaged over windows of ten steps, must lie within the seeds' range
widened by that range on either side.

Text: the standard library's sources unless data.sources=... says otherwise. Any key=value changes all runs.
--part N trains the N-th run of the question alone, say on a GPU of its own; --reuse compares runs
that are complete in OUT without training them again.
Prints the figures, writes QUESTION.json and .png (with matplotlib) into OUT and ends with 1 on a breach.
page: OUT.md from the two files in OUT, whose figures it takes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import ssmoe

TOLERANCE = 2e-3
WINDOW = 10
CHANGES = [
    "model.pattern.moe.capacity_factor=null",
    # the standard library's sources give about 35,000 tokens at most; the model keeps its vocabulary
    "data.tokenizer=bpe:16384",
    "train.eval_rows=8",
    "train.warmup_fraction=0.1",
    "train.keep_checkpoints=1",
]


def main() -> int:
    """Train what the question needs, then answer it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("question", choices=["backends", "precision", "page"])
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    parser.add_argument("--part", type=int)
    parser.add_argument("--reuse", action="store_true")
    given = parser.parse_intermixed_args()
    if given.question == "page":
        given.out.with_suffix(".md").write_text(page(given.out))
        return 0
    known = {"backends": (backend_runs, backends), "precision": (precision_runs, precision)}
    list_runs, answer = known[given.question]
    runs = list_runs(given.changes)
    if given.part is not None:
        name, steps, changes = runs[given.part]
        losses(given.out / name, steps, changes)
        return 0
    curves = {
        name: losses(given.out / name, steps, changes, reuse=given.reuse) for name, steps, changes in runs
    }
    curves, figures, held = answer(curves)
    given.out.mkdir(parents=True, exist_ok=True)
    figures |= environment([given.out / name for name, *_ in runs])
    (given.out / f"{given.question}.json").write_text(json.dumps({**figures, "curves": curves}, indent=2))
    draw(curves, given.out / f"{given.question}.png")
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    return 0 if held else 1


Run = tuple[str, int, list[str]]
"""Its name, how many steps, and what it changes."""
Answer = tuple[dict[str, list[float]], dict[str, object], bool]
"""Curves to draw, figures, and whether what was asked holds."""


def backend_runs(changes: Sequence[str]) -> list[Run]:
    """The device's kernels, then the reference backend."""
    small = ["data.context=256", "train.batch_size=4", "train.precision=float32", *changes]
    return [(name, 30, [*small, f"train.backend={name}"]) for name in ("auto", "reference")]


def backends(curves: dict[str, list[float]]) -> Answer:
    """The largest difference between the two, and whether it is small."""
    apart = [abs(ours - theirs) for ours, theirs in zip(*curves.values(), strict=True)]
    figures: dict[str, object] = {
        "steps": len(apart),
        "largest difference (nats)": max(apart),
        "tolerance": TOLERANCE,
    }
    return curves, figures, max(apart) <= TOLERANCE


def precision_runs(changes: Sequence[str]) -> list[Run]:
    """Three seeds in bfloat16, then the first of them in float32."""
    kinds = [("bfloat16", 0), ("bfloat16", 1), ("bfloat16", 2), ("float32", 0)]
    return [
        (f"{kind}-{seed}", 300, [f"train.precision={kind}", f"train.seed={seed}", *changes])
        for kind, seed in kinds
    ]


def precision(curves: dict[str, list[float]]) -> Answer:
    """By how far the float32 curve, the last, leaves the range of the others."""
    curves = {name: windows(curve) for name, curve in curves.items()}
    *seeds, exact = curves.values()
    spread = [max(values) - min(values) for values in zip(*seeds, strict=True)]
    outside = [
        max(min(values) - loss, loss - max(values), 0.0)
        for values, loss in zip(zip(*seeds, strict=True), exact, strict=True)
    ]
    figures: dict[str, object] = {
        "mean spread of the seeds (nats)": fmean(spread),
        "largest excess over their range": max(outside),
        "windows outside the widened range": sum(o > s for o, s in zip(outside, spread, strict=True)),
    }
    return curves, figures, all(o <= s for o, s in zip(outside, spread, strict=True))


def losses(folder: Path, steps: int, changes: Sequence[str], *, reuse: bool = False) -> list[float]:
    """The language-model loss of every step of one run, trained unless `reuse` finds it complete."""
    if not (reuse and len(curve(folder)) == steps):
        cadence = [f"train.{key}={steps}" for key in ("steps", "eval_every", "checkpoint_every")]
        run = ssmoe.preset("moe-mamba-25m", [*CHANGES, *cadence, *changes])
        ssmoe.train(run, folder, overwrite=folder.exists())
    return curve(folder)


def curve(folder: Path) -> list[float]:
    """What a run folder tells of its steps so far."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["lm_loss"] for line in lines if line["mode"] == "train"]


def environment(folders: Sequence[Path]) -> dict[str, object]:
    """Device and torch of the first run that has written them down."""
    for folder in folders:
        if (folder / "environment.json").is_file():
            found = json.loads((folder / "environment.json").read_text())
            return {"device": found["device"], "torch": found["versions"]["torch"]}
    return {}


PAGE = """# Do the GPU's kernels learn what the definitions learn?

Loss curves of dropless `moe-mamba-25m` (GPT-2's tokenizer), side by side. Every figure is taken by
`experiments/loss_curves/run.py page` from the JSON files that the same program wrote beside the runs.

## Kernels against the reference backend

{steps} steps of 4 x 256 tokens in float32, the same seed and batches ({device}): the largest difference
of a step's loss is **{apart:.1e} nats**. At most {tolerance:g} is asked, since a token near a router's tie
may change its expert by rounding.

![losses of the kernels and of the reference backend](loss_curves/backends.png)

## bfloat16 against float32

{windows} windows of ten steps of 64 x 1,024 tokens, three seeds in bfloat16 and the first of them in
float32, all by the kernels. The seeds lie {spread:.3f} nats apart on average. The float32 run {verdict}: it
leaves their range by at most {excess:.3f} nats, and in {outside} of {windows} windows by more than the
range is wide there. From the bfloat16 run of its own seed it differs by {same:.4f} nats on average,
{last:.4f} in the last window.

![losses of three seeds in bfloat16 and of one in float32](loss_curves/precision.png)

## Again

```
python experiments/loss_curves/run.py backends  --out docs/results/loss_curves data.sources=TEXT
python experiments/loss_curves/run.py precision --out docs/results/loss_curves data.sources=TEXT
python experiments/loss_curves/run.py page      --out docs/results/loss_curves
```

Each part of `precision` can have a GPU of its own (`--part`, then `--reuse`). Ours read package
descriptions, API documentation and books in GPT-2 tokens (`data.tokenizer=`), `model.vocab_size=50304`.
"""


def page(folder: Path) -> str:
    """The published page of both questions."""
    apart, mixed = (json.loads((folder / f"{name}.json").read_text()) for name in ("backends", "precision"))
    outside, spread = mixed["windows outside the widened range"], mixed["mean spread of the seeds (nats)"]
    first, *_, exact = mixed["curves"].values()
    between = [abs(a - b) for a, b in zip(first, exact, strict=True)]
    return PAGE.format(
        steps=apart["steps"],
        device=apart["device"],
        apart=apart["largest difference (nats)"],
        tolerance=apart["tolerance"],
        windows=len(exact),
        spread=spread,
        verdict="stays within the seeds' range widened by itself" if not outside else "does not stay there",
        excess=mixed["largest excess over their range"],
        outside=outside,
        same=fmean(between),
        last=between[-1],
    )


def windows(curve: Sequence[float]) -> list[float]:
    """Means of ten steps."""
    return [fmean(curve[begin : begin + WINDOW]) for begin in range(0, len(curve) - WINDOW + 1, WINDOW)]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves in one picture, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="step, or window of ten steps", ylabel="loss (nats)")
    for name, curve in curves.items():
        axes.plot(curve, label=name, linewidth=1)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
