"""A grid of small runs for fitting a law, and larger ones to test it on.

Every width meets every granularity and every number of tokens. D = level * base, with one base for all runs,
chosen so that the whole ladder costs the budget, held-out runs included.
"""

from collections.abc import Sequence
from math import floor, log2, sqrt
from typing import NamedTuple

from ssmoe.config.count import training_flops
from ssmoe.config.data import DataConfig
from ssmoe.config.load import RunConfig
from ssmoe.config.model import MambaConfig, ModelConfig
from ssmoe.config.train import TrainConfig
from ssmoe.scaling.cost import WIDTH_PER_BLOCK, Blocks
from ssmoe.scaling.shape import TILE, Shape, model_config

LEVELS = (1.0, 2.0, 4.0, 8.0)
"""Tokens of the fitted runs, in units of the base."""
HELD_OUT_LEVELS = (4.0, 12.0)
GRAINED = ("moe", "mamba-moe")
EVAL_ROWS = 512
"""Enough that the held-out loss is not the fit's noise."""
LEAST_STEPS = 100
LEAST_BATCH_TOKENS = 1024


class Ladder(NamedTuple):
    """Runs to fit and larger ones to hold out."""

    fitted: tuple[RunConfig, ...]
    held_out: tuple[RunConfig, ...]
    flops: float


class Rung(NamedTuple):
    """One run before its tokens are known."""

    model: ModelConfig
    level: float
    granularity: int


def ladder(
    flops: float,
    *,
    blocks: Blocks = "mamba-moe",
    expansion: int = 8,
    widths: Sequence[int] = (64, 96, 128, 192),
    granularities: Sequence[int] | None = None,
    levels: Sequence[float] = LEVELS,
    held_out_levels: Sequence[float] = HELD_OUT_LEVELS,
    vocab_size: int = 4096,
    context: int = 256,
) -> Ladder:
    """Runs that cost `flops` together, the head included; ValueError for grids that no fit could use.

    levels, held_out_levels: tokens of the runs, in units of the base that follows from `flops`.
    """
    if not 0 < flops < float("inf"):
        raise ValueError(f"--flops {flops:g}: give a positive number")
    if granularities is None:
        granularities = (1, 2, 4) if blocks in GRAINED else (1,)
    _check_grid(blocks, expansion, widths, granularities)
    _check_levels(levels, held_out_levels)
    largest = 32 * round(1.35 * max(widths) / 32)
    grains = tuple(sorted(set(granularities)))
    ends = (grains[0], grains[-1]) if len(grains) > 1 else grains

    def rungs(widths: Sequence[int], granularities: Sequence[int], levels: Sequence[float]) -> list[Rung]:
        return [
            Rung(_model(blocks, width, grain, expansion, vocab_size), level, grain)
            for width in widths
            for grain in granularities
            for level in levels
        ]

    fitted = rungs(sorted(set(widths)), grains, sorted(set(levels)))
    held_out = rungs((largest,), ends, sorted(set(held_out_levels)))
    shares = sum(training_flops(rung.model, context) * rung.level for rung in fitted + held_out)
    base = flops / shares
    least = LEAST_STEPS * max(LEAST_BATCH_TOKENS, context)
    if base < least:
        raise ValueError(
            f"{flops:.3g} FLOPs is too little for {len(fitted) + len(held_out)} runs of {LEAST_STEPS} steps "
            f"or more: give at least {shares * least:.2g}, or fewer --widths"
        )
    return Ladder(
        tuple(_run(rung, base, context, vocab_size, "fit") for rung in fitted),
        tuple(_run(rung, base, context, vocab_size, "held-out") for rung in held_out),
        flops,
    )


def _check_grid(blocks: Blocks, expansion: int, widths: Sequence[int], granularities: Sequence[int]) -> None:
    if expansion < 1:
        raise ValueError(f"--expansion {expansion}: a model has at least one expert")
    if len(set(widths)) < 2:
        raise ValueError(f"--widths {' '.join(map(str, widths))}: a law needs at least two model sizes")
    for width in widths:
        if width < TILE or width % TILE:
            raise ValueError(f"--widths {width}: widths are multiples of {TILE}")
    listed = f"--granularities {' '.join(map(str, granularities))}"
    if blocks not in GRAINED and set(granularities) != {1}:
        raise ValueError(f"{listed}: {blocks} models have no granularity")
    if blocks in GRAINED and len(set(granularities)) < 3:
        raise ValueError(f"{listed}: a, g and gamma need at least three")
    for grain in granularities:
        d_ff = (3 if blocks == "mamba-moe" else 4) * min(widths)
        if grain < 1 or d_ff / grain < TILE:
            raise ValueError(
                f"--granularities {grain}: experts of width {min(widths)}'s d_ff / G would be under {TILE}"
            )


def _check_levels(levels: Sequence[float], held_out: Sequence[float]) -> None:
    if len(set(levels)) < 2:
        raise ValueError(f"--levels {_listed(levels)}: a law needs at least two numbers of tokens")
    for option, values in (("--levels", levels), ("--held-out-levels", held_out)):
        for value in values:
            if not 1 <= value < 1000:
                raise ValueError(f"{option} {value:g}: levels are multiples of the base, 1 or more")


def _listed(levels: Sequence[float]) -> str:
    return " ".join(f"{level:g}" for level in levels)


def _model(blocks: Blocks, width: int, granularity: int, expansion: int, vocab_size: int) -> ModelConfig:
    shape = Shape(width, max(2, round(width / WIDTH_PER_BLOCK)), granularity)
    return model_config(blocks, shape, expansion=expansion, vocab_size=vocab_size)


def _run(rung: Rung, base: float, context: int, vocab_size: int, prefix: str) -> RunConfig:
    """One batch size for the whole ladder, so that only N, D and G differ."""
    tokens = base * rung.level
    batch_tokens = max(LEAST_BATCH_TOKENS, 2 ** floor(log2(base / (2 * LEAST_STEPS))))
    rows = max(1, min(batch_tokens, 1 << 19) // context)
    steps = round(tokens / (rows * context))
    width = rung.model.d_model
    return RunConfig(
        name=f"{prefix}-d{width:04d}-g{rung.granularity:03d}-t{rung.level:02g}",
        description=f"a rung of a scaling ladder: {tokens:.3g} tokens",
        model=rung.model,
        data=DataConfig(tokenizer="bytes" if vocab_size < 257 else f"bpe:{vocab_size}", context=context),
        train=TrainConfig(
            steps=steps,
            batch_size=rows,
            learning_rate=_learning_rate(rung.model),
            clip_norm=1.0,
            beta2=0.95,
            warmup_fraction=0.05,
            eval_every=max(1, steps),
            eval_rows=EVAL_ROWS,
            checkpoint_every=max(1, steps),
        ),
    )


def _learning_rate(model: ModelConfig) -> float:
    """For Mamba as measured at widths 64 and 192 with batches of 8,192 tokens, where 2e-3 lost 0.4 nats."""
    width = model.d_model
    if any(isinstance(layer, MambaConfig) for layer in model.pattern):
        return float(f"{min(0.01, 0.09 / sqrt(width)):.2g}")
    return float(f"{min(2e-3, 5e-4 * 512 / width):.2g}")
