import numpy as np
import pytest

from ssmoe.scaling.design import check_design, check_identified
from ssmoe.scaling.fit import fit
from ssmoe.scaling.runs import Point
from tests.scaling.synthetic import GRID, draw


def only(**fixed):
    place = {"N": 0, "D": 1, "G": 2}
    grid = [list(run) for run in GRID]
    for run in grid:
        for name, value in fixed.items():
            run[place[name]] = value
    return draw(0, tuple(map(tuple, grid)))


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (only(G=1), {}, "one granularity, G = 1, which cannot tell a, g and gamma apart.*--form dense"),
        ([p for p in draw(0) if p.granularity < 16], {}, "only 2 granularities, G = 1, 4"),
        (only(N=1e8), {}, r"one model size, N = 1e\+08, which cannot tell a from alpha: add"),
        (only(D=1e10), {}, r"one number of tokens, D = 1e\+10, which cannot tell b from beta: add"),
        ([p for p in draw(0) if p.parameters < 1e8], {"c": None}, "only 2 model sizes.* alpha and c"),
        (draw(0)[:8], {}, "8 runs are too few for 6 coefficients: give at least 9"),
        (draw(0)[:9], {"c": None}, "too few for 7"),
        (draw(0), {"form": "dense"}, "dense form has no granularity"),
        (draw(0), {"c": 2.6}, "is not above c = 2.6"),
        ([p._replace(tokens=20 * p.parameters) for p in draw(0)], {}, "N and D rise together"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_designs_that_identify_too_little_are_refused_with_the_reason(points, options, message):
    with pytest.raises(ValueError, match=message):
        fit(points, **{"c": 0.47, **options})


def test_sizes_that_hardly_differ_count_as_one():
    points = [p._replace(parameters=1e8 * (1 + 0.0005 * i)) for i, p in enumerate(draw(0))]
    with pytest.raises(ValueError, match="clearly different N"):
        check_design(points, form="fine-grained", c=0.47)


def test_losses_without_granularity_leave_g_unidentified():
    flat = [Point(p.name, p.parameters, p.tokens, p.granularity, 3 + 1e9 / p.tokens) for p in draw(0)]
    with pytest.raises(ValueError, match="identify"):
        fit(flat, c=0.47)


def test_dependent_columns_are_named():
    rng = np.random.default_rng(0)
    column = rng.standard_normal((20, 1))
    with pytest.raises(ValueError, match="do not identify a, b"):
        check_identified(np.hstack([column, 2 * column, rng.standard_normal((20, 1))]), ("a", "b", "c"))
    with pytest.raises(ValueError, match="do not depend on b"):
        check_identified(np.hstack([column, 0 * column]), ("a", "b"))
