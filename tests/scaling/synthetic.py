"""Runs drawn from the published law, and the runs beyond them that a fit is to predict."""

import numpy as np

from ssmoe.scaling.law import Law, loss
from ssmoe.scaling.published import MOE_64
from ssmoe.scaling.runs import Point

GRID = tuple(
    (size, tokens, granularity)
    for size in np.geomspace(1e7, 1e10, 6).tolist()
    for tokens in np.geomspace(1e9, 2e11, 5).tolist()
    for granularity in (1, 4, 16, 64)
)
"""120 runs over three decades of N and two of D."""

SHAPES = ((4, 256), (4, 384), (4, 512), (8, 512), (10, 640), (12, 768))
PAPER_GRID = tuple(
    (516.0 * d_model**2 * num_blocks, tokens, granularity)
    for num_blocks, d_model in SHAPES
    for tokens in (1.6e10, 3.3e10, 6.6e10, 1.3e11)
    for granularity in (1, 2, 4, 8, 16)
)
"""120 runs in the ranges that the paper states for its own."""


def draw(seed: int, grid=GRID, law: Law = MOE_64, noise: float = 0.01) -> list[Point]:
    """The grid's runs, each loss times exp(noise * a standard normal)."""
    errors = np.exp(noise * np.random.default_rng(seed).standard_normal(len(grid)))
    return [
        Point(f"run{i}", size, tokens, granularity, loss(law, size, tokens, granularity) * error)
        for i, ((size, tokens, granularity), error) in enumerate(zip(grid, errors.tolist(), strict=True))
    ]


def beyond(grid=GRID, law: Law = MOE_64) -> list[Point]:
    """Four runs larger than every one of the grid, with the law's own losses."""
    size, tokens = max(run[0] for run in grid), max(run[1] for run in grid)
    larger = (
        (2 * size, tokens, 16),
        (size, 2 * tokens, 16),
        (2 * size, 2 * tokens, 4),
        (2 * size, 2 * tokens, 16),
    )
    return [Point(f"beyond{i}", *run, loss(law, *run)) for i, run in enumerate(larger)]
