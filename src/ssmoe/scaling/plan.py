"""What to train with a budget: the law's optimum under caps, rounded to shapes that kernels like.

The budget is FLOPs, GPU hours at a measured MFU, or a cap on the model with one on the tokens. The optimum
(`ssmoe.scaling.optimum`) is exact for real numbers; rounding then tries the multiples of 64 on either side of
its width with the depths that keep N, and takes the lowest loss by the counts of the rounded model.
"""

from collections.abc import Sequence
from math import ceil, floor, log, log2
from typing import NamedTuple

from ssmoe.config.count import count_parameters
from ssmoe.config.data import DataConfig
from ssmoe.config.load import RunConfig
from ssmoe.config.train import TrainConfig
from ssmoe.scaling.budget import BYTES_PER_PARAMETER, Budget
from ssmoe.scaling.cost import WIDTH_PER_BLOCK
from ssmoe.scaling.law import Law, loss, token_flops
from ssmoe.scaling.optimum import Bounds, Choice, best_width, on_budget, optimum, width_for
from ssmoe.scaling.shape import Shape, counts, model_config, smallest_width, width_step

SMALL_VOCABULARY, LARGE_VOCABULARY = 4096, 50257
MOST_BATCH_TOKENS = 1 << 19
MICRO_BATCH_TOKENS = 1 << 15
MOST_FLOPS = 1e29


class Plan(NamedTuple):
    """A configuration, what it is expected to reach, and the optimum it was rounded from."""

    law: Law
    exact: Choice
    others: tuple[Choice, ...]
    """The optima at half and twice the granularity, where there are any."""
    run: RunConfig
    shape: Shape
    parameters: float
    """N as the law counts it."""
    tokens: float
    flops: float
    """As the law counts them."""
    flops_with_head: float
    loss: float
    memory_bytes: float
    """Weights, gradients and AdamW in float32; activations come on top."""
    seconds: float | None


def plan(
    budget: Budget,
    candidates: Sequence[Law],
    *,
    granularity: int | None = None,
    vocab_size: int | None = None,
    context: int = 1024,
    name: str = "plan",
) -> Plan:
    """The best run within a budget; raises ValueError for a budget that no model fits.

    `vocab_size` defaults to 4096 below 1e18 FLOPs and GPT-2's 50257 above.
    """
    budget.check()
    _check_sizes(granularity, vocab_size, context)
    flops = budget.total_flops
    if vocab_size is None:
        vocab_size = SMALL_VOCABULARY if flops is not None and flops < 1e18 else LARGE_VOCABULARY
    grains = None if granularity is None else (granularity,)
    if granularity is not None and any(granularity > 1 and law.coefficients.g == 0 for law in candidates):
        raise ValueError(f"law {candidates[0].name} has no granularity: leave out --granularity")
    exact = _solve(budget, candidates, grains, vocab_size)
    others = [
        _solve(budget, (exact.law,), (other,), vocab_size)
        for other in (exact.granularity // 2, exact.granularity * 2)
        if other in exact.law.granularities and smallest_width(exact.law.blocks, other) <= exact.d_model
    ]
    return _rounded(budget, exact, tuple(others), vocab_size, context, name)


def _check_sizes(granularity: int | None, vocab_size: int | None, context: int) -> None:
    for option, value in (
        ("--granularity", granularity),
        ("--vocab-size", vocab_size),
        ("--context", context),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value}: give a whole number of at least 1")


def _solve(
    budget: Budget, candidates: Sequence[Law], grains: tuple[int, ...] | None, vocab_size: int
) -> Choice:
    """The exact optimum within the budget and its caps."""
    flops = budget.total_flops
    if flops is None:
        return _from_caps(budget, candidates, grains, vocab_size)
    if flops > MOST_FLOPS:
        raise ValueError(f"{flops:.3g} FLOPs is out of range: plans go up to {MOST_FLOPS:.0e}")

    def bounds(law: Law, granularity: int) -> Bounds:
        return _bounds(budget, law, granularity, flops, vocab_size)

    try:
        exact = optimum(candidates, flops, grains, bounds)
    except ValueError as error:
        raise ValueError(_no_room(budget, candidates, flops, grains, vocab_size)) from error
    free = best_width(exact.law, flops, exact.granularity)
    if free.d_model < WIDTH_PER_BLOCK:
        raise ValueError(
            f"{flops:.3g} FLOPs is too little: the optimum is {free.d_model:.0f} wide, "
            f"narrower than one block of width {WIDTH_PER_BLOCK}"
        )
    return exact


def _bounds(budget: Budget, law: Law, granularity: int, flops: float, vocab_size: int) -> Bounds:
    """Widths within every cap."""
    extra = 6.0 * vocab_size if budget.counts_head and law.blocks != "moe-swiglu" else 0.0
    smallest = smallest_width(law.blocks, granularity)
    largest = Bounds().largest_width
    most = budget.most_parameters
    if most is not None:
        largest = width_for(lambda d: _stored(law, d, granularity, vocab_size), most)
    if budget.max_tokens is not None:
        least = flops / budget.max_tokens
        cost = law.cost.flops
        spends = width_for(lambda d: cost.at(d, d / WIDTH_PER_BLOCK, granularity) + extra * d, least)
        smallest = max(smallest, spends)
    return Bounds(smallest, largest, extra)


def _stored(law: Law, d_model: float, granularity: int, vocab_size: int) -> float:
    """Every parameter, embedding included."""
    total = law.cost.total.at(d_model, d_model / WIDTH_PER_BLOCK, granularity)
    return total if law.blocks == "moe-swiglu" else total + vocab_size * d_model


def _no_room(
    budget: Budget, candidates: Sequence[Law], flops: float, grains: tuple[int, ...] | None, vocab_size: int
) -> str:
    """Why the caps leave no model."""
    law, granularity = candidates[0], (grains or (1,))[0]
    most = budget.most_parameters
    width = smallest_width(law.blocks, granularity)
    least = _stored(law, width, granularity, vocab_size)
    if most is not None and most < least:
        return (
            f"{budget.parameter_cap} leaves room for {most:.3g} parameters, but the smallest model of law "
            f"{law.name} (width {width:.0f}, E = {law.expansion:g}, G = {granularity}) has {least:.3g}"
        )
    limit = "" if most is None else f" and {budget.parameter_cap} ({most:.3g} parameters)"
    return (
        f"the caps contradict the budget: no model within --tokens {budget.max_tokens or 0:.3g}{limit} "
        f"can spend {flops:.3g} FLOPs; raise a cap or lower the budget"
    )


def _from_caps(
    budget: Budget, candidates: Sequence[Law], grains: tuple[int, ...] | None, vocab_size: int
) -> Choice:
    """The largest model within its cap, trained on all tokens.

    Finer experts always lower the loss, and no cap here limits the FLOPs they cost; so G is the optimal one
    for the FLOPs of such a model.
    """
    most, tokens = budget.most_parameters, budget.max_tokens
    assert most is not None
    assert tokens is not None
    choices: list[Choice] = []
    for law in candidates:
        first = _largest(law, most, tokens, (grains or (1,))[0], vocab_size)
        allowed = [g for g in law.granularities if smallest_width(law.blocks, g) <= first.d_model]
        finest = (grains or (optimum((law,), first.flops, allowed or [1]).granularity,))[0]
        choice = _largest(law, most, tokens, finest, vocab_size)
        if choice.d_model >= smallest_width(law.blocks, finest):
            choices.append(choice)
    if not choices:
        raise ValueError(_no_room(budget, candidates, 0.0, grains, vocab_size))
    return min(choices, key=lambda choice: choice.loss)


def _largest(law: Law, most: float, tokens: float, granularity: int, vocab_size: int) -> Choice:
    """The model of `most` parameters on all tokens."""
    width = width_for(lambda d: _stored(law, d, granularity, vocab_size), most)
    flops = tokens * token_flops(law, width, width / WIDTH_PER_BLOCK, granularity)
    return on_budget(law, flops, width, granularity)


def _rounded(
    budget: Budget, exact: Choice, others: tuple[Choice, ...], vocab_size: int, context: int, name: str
) -> Plan:
    """The lowest loss among whole shapes near the optimum that keep the caps."""
    law, best = exact.law, None
    for shape in _shapes(exact):
        config = model_config(law.blocks, shape, expansion=law.expansion, vocab_size=vocab_size)
        stored = count_parameters(config).total
        if budget.most_parameters is not None and stored > budget.most_parameters:
            continue
        size, per_token, with_head = counts(law, shape, config)
        spent = with_head if budget.counts_head else per_token
        tokens = exact.tokens if budget.total_flops is None else exact.flops / spent
        if budget.max_tokens is not None:
            tokens = min(tokens, budget.max_tokens)
        value = loss(law, size, tokens, shape.granularity)
        if best is None or value < best[0]:
            best = value, shape, config, size, tokens, per_token, with_head, stored
    if best is None:
        raise ValueError("no multiple of 64 near the best width keeps the caps: raise --params or --memory")
    value, shape, config, size, tokens, per_token, with_head, stored = best
    train = _training(exact, tokens, shape.d_model, context, on_gpu=budget.gpu is not None)
    speed = budget.flops_per_second
    run = RunConfig(
        name=name,
        description=f"ssmoe plan, law {law.name}: {exact.flops:.3g} FLOPs, expected loss {value:.3f}",
        model=config,
        data=DataConfig(tokenizer="bytes" if vocab_size < 257 else f"bpe:{vocab_size}", context=context),
        train=train,
    )
    return Plan(
        law=law,
        exact=exact,
        others=others,
        run=run,
        shape=shape,
        parameters=size,
        tokens=tokens,
        flops=per_token * tokens,
        flops_with_head=with_head * tokens,
        loss=value,
        memory_bytes=BYTES_PER_PARAMETER * stored,
        seconds=None if speed is None else with_head * tokens / speed,
    )


def _shapes(exact: Choice) -> list[Shape]:
    """The widths on either side of the optimum's, each with depths around and below the one that keeps its N.

    The shallower ones are for caps, where rounding made the experts wider. Shapes far from d = 64 num_blocks,
    of which the laws say nothing, are left out where there are others.
    """
    step = width_step(exact.law.blocks, exact.granularity)
    shapes: list[Shape] = []
    for multiple in sorted({max(1, floor(exact.d_model / step)), ceil(exact.d_model / step)}):
        d_model = multiple * step
        depth = exact.num_blocks * (exact.d_model / d_model) ** 2
        depths = range(max(1, floor(0.7 * depth)), max(1, ceil(depth)) + 1)
        shapes += [Shape(d_model, num_blocks, exact.granularity) for num_blocks in depths]
    usual = [s for s in shapes if abs(log(s.d_model / (WIDTH_PER_BLOCK * s.num_blocks))) < log(1.5)]
    return usual or shapes


def _training(exact: Choice, tokens: float, d_model: int, context: int, *, on_gpu: bool) -> TrainConfig:
    """At most half a million tokens a batch, 2000 steps or more; the learning rate falls with the width.

    5e-4 at width 512 is that of arXiv 2401.04081; the fall as 1 / width is a habit, not a result of the law.
    """
    batch_tokens = min(MOST_BATCH_TOKENS, 2 ** floor(log2(max(1.0, tokens / 2000))))
    rows = max(1, batch_tokens // context)
    steps = max(1, round(tokens / (rows * context)))
    micro = max(1, MICRO_BATCH_TOKENS // context)
    while rows % micro:
        micro -= 1
    return TrainConfig(
        steps=steps,
        batch_size=rows,
        micro_batch_size=micro if micro < rows else None,
        learning_rate=float(f"{min(2e-3, max(1e-4, 5e-4 * 512 / d_model)):.2g}"),
        precision="bfloat16" if on_gpu or exact.flops >= 1e18 else "float32",
        clip_norm=1.0,
        beta2=0.95,
        eval_every=max(1, steps // 20),
        checkpoint_every=max(1, steps // 10),
    )
