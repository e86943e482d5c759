"""The best (N, D, G) for a budget under a law, and the curves of equal loss and equal FLOPs.

Along d = 64 num_blocks a budget F leaves one free number for each G, the width: D = F / (FLOPs a token). The
loss is then a sum of convex functions of log d, so one golden-section search a power of two of G is exact.
"""

from collections.abc import Callable, Iterable, Sequence
from math import exp, log
from typing import NamedTuple

from ssmoe.scaling.cost import WIDTH_PER_BLOCK
from ssmoe.scaling.law import Law, loss, parameters, token_flops, tokens_for_loss

SMALLEST_WIDTH, LARGEST_WIDTH = 1.0, 1e7


class Choice(NamedTuple):
    """A model and its tokens, before any rounding."""

    law: Law
    d_model: float
    num_blocks: float
    granularity: int
    parameters: float
    tokens: float
    flops: float
    loss: float


class Bounds(NamedTuple):
    """Widths to search, and FLOPs a token beside the law's for a unit of width (the head's, say)."""

    smallest_width: float = SMALLEST_WIDTH
    largest_width: float = LARGEST_WIDTH
    extra_flops: float = 0.0


UNBOUNDED = Bounds()


def optimum(
    candidates: Sequence[Law],
    flops: float,
    granularities: Sequence[int] | None = None,
    bounds: Callable[[Law, int], Bounds] | None = None,
) -> Choice:
    """The lowest loss for a budget over laws (`published.laws`), granularities and widths.

    `bounds` may narrow the widths for a law and granularity. Raises ValueError where it leaves none.
    """
    choices: list[Choice] = []
    for law in candidates:
        for granularity in granularities or law.granularities:
            limits = bounds(law, granularity) if bounds else UNBOUNDED
            if limits.smallest_width <= limits.largest_width:
                choices.append(best_width(law, flops, granularity, limits))
    if not choices:
        raise ValueError("no width is left to choose from")
    return min(choices, key=lambda choice: choice.loss)


def best_width(law: Law, flops: float, granularity: int, bounds: Bounds = UNBOUNDED) -> Choice:
    """The lowest loss for a budget at one granularity."""
    if flops <= 0:
        raise ValueError(f"a budget of {flops:g} FLOPs buys nothing: give more than 0")

    def at(log_width: float) -> Choice:
        return on_budget(law, flops, exp(log_width), granularity, bounds.extra_flops)

    best = minimise(lambda x: at(x).loss, log(bounds.smallest_width), log(bounds.largest_width))
    return at(best)


def on_budget(law: Law, flops: float, d_model: float, granularity: int, extra_flops: float = 0.0) -> Choice:
    """The model of a width that spends a budget."""
    num_blocks = d_model / WIDTH_PER_BLOCK
    size = parameters(law, d_model, num_blocks, granularity)
    tokens = flops / (token_flops(law, d_model, num_blocks, granularity) + extra_flops * d_model)
    value = loss(law, size, tokens, granularity)
    return Choice(law, d_model, num_blocks, granularity, size, tokens, flops, value)


def iso_flops(law: Law, flops: float, granularity: int, widths: Iterable[float]) -> list[Choice]:
    """Models of several widths that spend the same budget."""
    return [on_budget(law, flops, width, granularity) for width in widths]


def iso_loss(law: Law, target: float, granularity: int, widths: Iterable[float]) -> list[Choice]:
    """Models of several widths that reach the same loss; widths too small ever to reach it are left out."""
    choices: list[Choice] = []
    for width in widths:
        num_blocks = width / WIDTH_PER_BLOCK
        size = parameters(law, width, num_blocks, granularity)
        tokens = tokens_for_loss(law, target, size, granularity)
        if tokens < float("inf"):
            flops = tokens * token_flops(law, width, num_blocks, granularity)
            choices.append(Choice(law, width, num_blocks, granularity, size, tokens, flops, target))
    return choices


def flops_for_loss(candidates: Sequence[Law], target: float) -> float:
    """The least FLOPs with which a law reaches a loss; infinite at or below its constant c."""
    if all(target <= law.coefficients.c for law in candidates):
        return float("inf")
    low, high = log(1e3), log(1e60)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if optimum(candidates, exp(middle)).loss > target else (low, middle)
    return exp(high)


def width_for(count: Callable[[float], float], value: float) -> float:
    """The width at which an increasing count reaches a value."""
    low, high = log(1e-3), log(LARGEST_WIDTH)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if count(exp(middle)) < value else (low, middle)
    return exp(low)


def minimise(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum in [low, high] has it, by golden sections."""
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 1e-9:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2
