from math import exp, log

import pytest
from scipy.optimize import minimize_scalar

from ssmoe.scaling.law import loss
from ssmoe.scaling.optimum import (
    Bounds,
    best_width,
    flops_for_loss,
    iso_flops,
    iso_loss,
    minimise,
    on_budget,
    optimum,
    width_for,
)
from ssmoe.scaling.published import DENSE, MOE_64, SSM, laws


@pytest.mark.parametrize("law", [MOE_64, SSM, DENSE], ids=lambda law: law.name)
@pytest.mark.parametrize("flops", [1e17, 1e21, 1e25])
def test_golden_sections_find_brent_s_minimum(law, flops):
    grain = law.granularities[-1]
    brent = minimize_scalar(
        lambda x: on_budget(law, flops, exp(x), grain).loss, bracket=(log(100), log(2000)), method="brent"
    )
    found = best_width(law, flops, grain)
    assert found.loss <= brent.fun + 1e-12
    assert found.d_model == pytest.approx(exp(brent.x), rel=1e-4)


def test_optimum_beats_every_neighbour():
    best = optimum((MOE_64,), 1e20)
    for width in (best.d_model * 0.9, best.d_model * 1.1):
        assert on_budget(MOE_64, 1e20, width, best.granularity).loss > best.loss
    for grain in (best.granularity // 2, best.granularity * 2):
        assert best_width(MOE_64, 1e20, grain).loss > best.loss


def test_bounds_hold_and_a_fixed_granularity_is_kept():
    best = optimum((MOE_64,), 1e20, (4,), lambda law, granularity: Bounds(largest_width=500))
    assert best.granularity == 4
    assert best.d_model == pytest.approx(500, rel=1e-6)
    with pytest.raises(ValueError, match="no width"):
        optimum((MOE_64,), 1e20, (4,), lambda law, granularity: Bounds(10, 5))


def test_joint_law_prefers_more_experts_when_only_compute_counts():
    assert optimum(laws("joint"), 1e20).law.expansion == 32


def test_curves_keep_what_they_promise():
    widths = (200.0, 400.0, 800.0, 1600.0)
    for choice in iso_flops(SSM, 1e19, 8, widths):
        assert choice.flops == 1e19
        assert choice.loss == pytest.approx(loss(SSM, choice.parameters, choice.tokens, 8))
    curve = iso_loss(SSM, 2.9, 8, widths)
    assert 0 < len(curve) < len(widths)
    for choice in curve:
        assert loss(SSM, choice.parameters, choice.tokens, 8) == pytest.approx(2.9)


def test_flops_for_loss_inverts_the_optimum():
    assert flops_for_loss((DENSE,), optimum((DENSE,), 1e21).loss) == pytest.approx(1e21, rel=1e-6)
    assert flops_for_loss((DENSE,), 0.47) == float("inf")


def test_searches():
    assert minimise(lambda x: (x - 1.25) ** 2, -10, 10) == pytest.approx(1.25, abs=1e-6)
    assert width_for(lambda d: d**3, 1e6) == pytest.approx(100)


def test_no_budget_buys_nothing():
    with pytest.raises(ValueError, match="more than 0"):
        best_width(MOE_64, 0, 1)
