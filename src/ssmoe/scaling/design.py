"""Which runs can identify which coefficients, and the reason where they cannot."""

from collections.abc import Sequence
from math import log
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ssmoe.scaling.runs import Point

SPARE_RUNS = 3
"""Runs beyond one a coefficient, from which the noise is estimated."""
MOST_CORRELATION = 0.99
MOST_CONDITION = 1e6


def check_design(points: Sequence[Point], *, form: Literal["fine-grained", "dense"], c: float | None) -> None:
    """Raise ValueError, with the reason and the remedy, where no fit could identify every coefficient."""
    free = (4 if form == "dense" else 6) + (c is None)
    if len(points) < free + SPARE_RUNS:
        raise ValueError(
            f"{len(points)} runs are too few for {free} coefficients: give at least {free + SPARE_RUNS}"
        )
    for point in points:
        if not point.loss > (c or 0.0):
            raise ValueError(
                f"{point.name}: its loss {point.loss:g} is not above c = {c or 0.0:g}: lower --c"
            )
    sizes = sorted({point.parameters for point in points})
    lengths = sorted({point.tokens for point in points})
    grains = sorted({point.granularity for point in points})
    least = 3 if c is None else 2
    if form == "fine-grained" and len(grains) < 3:
        raise ValueError(
            f"{_only(grains, 'granularity', 'granularities', 'G')}, which cannot tell a, g and gamma apart: "
            "add runs with at least 3 values of G, or fit the form without granularity (--form dense)"
        )
    if form == "dense" and len(grains) > 1:
        raise ValueError(f"the dense form has no granularity, but the runs have G = {_list(grains)}")
    if _levels(sizes) < least:
        raise ValueError(
            f"{_only(sizes, 'model size', 'model sizes', 'N')}, which cannot tell a from alpha{_with_c(c)}: "
            f"add runs with at least {least} clearly different N"
        )
    if _levels(lengths) < least:
        raise ValueError(
            f"{_only(lengths, 'number of tokens', 'numbers of tokens', 'D')}, "
            f"which cannot tell b from beta{_with_c(c)}: add runs with at least {least} clearly different D"
        )
    logs = np.log([[point.parameters, point.tokens] for point in points])
    if abs(float(np.corrcoef(logs.T)[0, 1])) > MOST_CORRELATION:
        raise ValueError(
            "N and D rise together in every run, so that alpha and beta cannot be told apart: "
            "vary the tokens at a fixed model size"
        )


def check_identified(jacobian: NDArray[np.float64], names: Sequence[str]) -> None:
    """Raise ValueError naming the coefficients that the runs leave undetermined at the optimum."""
    norms = np.linalg.norm(jacobian, axis=0)
    if norms.min() < 1e-9 * norms.max():
        lost = ", ".join(name for name, norm in zip(names, norms, strict=True) if norm < 1e-9 * norms.max())
        raise ValueError(
            f"the losses do not depend on {lost} at the fitted optimum: these runs do not identify it"
        )
    _, singular, directions = np.linalg.svd(jacobian / norms)
    if singular[-1] * MOST_CONDITION < singular[0]:
        mixed = [name for name, part in zip(names, directions[-1], strict=True) if abs(part) > 0.3]
        raise ValueError(
            f"these runs do not identify {', '.join(mixed)}: a change of one is made up for by the others; "
            "spread N, D and G further, or fix c"
        )


def _levels(values: Sequence[float]) -> int:
    """How many values differ by more than a tenth from the one below."""
    count, last = 0, 0.0
    for value in values:
        if last == 0.0 or log(value / last) > 0.1:
            count, last = count + 1, value
    return count


def _only(values: Sequence[float], one: str, several: str, symbol: str) -> str:
    count = "one" if len(values) == 1 else f"only {len(values)}"
    return f"the runs have {count} {one if len(values) == 1 else several}, {symbol} = {_list(values)}"


def _list(values: Sequence[float]) -> str:
    shown = [f"{value:.4g}" for value in values[:4]]
    return ", ".join(shown) + (" ..." if len(values) > 4 else "")


def _with_c(c: float | None) -> str:
    return " and c" if c is None else ""
