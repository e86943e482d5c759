import numpy as np
import pytest

from ssmoe.scaling.fit import as_data, fit, predict, relative_errors, to_law
from ssmoe.scaling.law import loss
from ssmoe.scaling.published import DENSE, MOE_64
from tests.scaling.synthetic import GRID, PAPER_GRID, beyond, draw


@pytest.mark.parametrize("method", ["paper", "multistart"])
@pytest.mark.parametrize("c", [0.47, None])
def test_exact_runs_give_the_coefficients_back(method, c):
    found = fit(draw(0, noise=0), c=c, method=method).coefficients
    for name, value in MOE_64.coefficients:
        assert getattr(found, name) == pytest.approx(value, rel=2e-2), name


def test_dense_form():
    points = draw(0, tuple(run for run in GRID if run[2] == 1), DENSE, noise=0)
    found = fit(points, form="dense", c=0.47)
    assert found.names == ("a", "alpha", "b", "beta")
    assert found.coefficients.a == pytest.approx(16.3, rel=1e-2)
    assert found.coefficients.g == 0


def test_derivatives_are_those_of_the_prediction():
    data = as_data(draw(0)[:20])
    theta = np.log([1.0, 0.2, 0.8, 0.3, 0.2, 0.6, 0.5])
    for form, c, at in (
        ("fine-grained", 0.47, theta[:6]),
        ("fine-grained", None, theta),
        ("dense", 0.47, theta[:4]),
        ("dense", None, theta[[0, 1, 2, 3, 6]]),
    ):
        _, jacobian = predict(at, data, form, c)
        for i, step in enumerate(1e-6 * np.eye(len(at))):
            above, below = predict(at + step, data, form, c)[0], predict(at - step, data, form, c)[0]
            assert jacobian[:, i] == pytest.approx((above - below) / 2e-6, abs=1e-8)


def test_several_starts_never_end_higher_than_one():
    for seed in range(3):
        points = draw(seed, PAPER_GRID)
        one, several = fit(points, c=0.47), fit(points, c=0.47, method="multistart")
        assert several.objective <= one.objective * (1 + 1e-9)


def test_an_outlier_counts_little():
    points = draw(0, noise=0.002)
    spoilt = [points[0]._replace(loss=points[0].loss * 3), *points[1:]]
    clean, robust = fit(points, c=0.47), fit(spoilt, c=0.47)
    assert np.abs(relative_errors(robust, points[1:])).max() < 0.02
    assert np.abs(relative_errors(clean, points)).max() < 0.01


def test_noise_of_a_hundredth_leaves_held_out_losses_within_half():
    errors = [np.abs(relative_errors(fit(draw(seed), c=0.47), beyond())).mean() for seed in range(5)]
    assert np.mean(errors) < 0.005


def test_a_fit_becomes_a_law_with_the_range_of_its_runs():
    points = draw(1)
    found = fit(points, c=0.47)
    law = to_law(found, points, name="mine", blocks="mamba-moe", expansion=8, intervals={"a": (1, 2)})
    assert law.valid.parameters == pytest.approx((1e7, 1e10))
    assert law.valid.granularity == (1, 64)
    assert law.rmse == pytest.approx(0.03, abs=0.02)
    assert relative_errors(found, points[:1])[0] == pytest.approx(
        loss(law, *points[0][1:4]) / points[0].loss - 1
    )
