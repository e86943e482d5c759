"""Done-when 2 of the issue: intervals that cover, held-out losses that are met."""

import numpy as np
import pytest

from ssmoe.scaling.fit import fit, relative_errors
from ssmoe.scaling.intervals import bootstrap, profile, refit
from ssmoe.scaling.published import MOE_64
from tests.scaling.synthetic import GRID, PAPER_GRID, beyond, draw

TRUE = MOE_64.coefficients.model_dump(exclude={"c"})


def covered(intervals):
    return [low <= TRUE[name] <= high for name, (low, high) in intervals.items()]


def test_refitting_the_same_losses_stays_at_the_optimum():
    found = fit(draw(0), c=0.47)
    again = refit(found.theta[None], found.data.log_loss[None], found)[0]
    assert again == pytest.approx(found.theta, abs=1e-4)


def test_intervals_hold_the_estimate_and_shrink_with_the_noise():
    loud, quiet = fit(draw(0), c=0.47), fit(draw(0, noise=0.001), c=0.47)
    for method in (profile, bootstrap):
        wide, narrow = method(loud), method(quiet)
        assert tuple(wide) == loud.names == tuple(TRUE)
        for name, (low, high) in wide.items():
            assert low < getattr(loud.coefficients, name) < high
            assert np.log(narrow[name][1] / narrow[name][0]) < 0.2 * np.log(high / low)


def test_free_c_and_dense_form_have_intervals_too():
    assert "c" in profile(fit(draw(0, noise=0.001), c=None))
    points = [p for p in draw(0, noise=0.001) if p.granularity == 1]
    assert set(bootstrap(fit(points, form="dense", c=0.47))) == {"a", "alpha", "b", "beta"}


def test_the_bootstrap_repeats_with_its_seed():
    found = fit(draw(0), c=0.47)
    assert bootstrap(found, resamples=50, seed=3) == bootstrap(found, resamples=50, seed=3)
    assert bootstrap(found, resamples=50, seed=3) != bootstrap(found, resamples=50, seed=4)
    with pytest.raises(ValueError, match="at least 40"):
        bootstrap(found, resamples=10)


def test_intervals_of_ten_data_sets_mostly_cover():
    fits = [fit(draw(seed), c=0.47) for seed in range(10)]
    assert np.mean([covered(profile(found)) for found in fits]) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("grid", "within"), [(GRID, 0.9), (PAPER_GRID, 0.75)], ids=["wide", "paper"])
def test_intervals_of_a_hundred_data_sets_cover_as_they_say(grid, within, capsys):
    profiles, bootstraps, errors = [], [], []
    for seed in range(100):
        found = fit(draw(seed, grid), c=0.47)
        profiles.append(covered(profile(found)))
        bootstraps.append(covered(bootstrap(found, resamples=200)))
        errors.append(np.abs(relative_errors(found, beyond(grid))))
    with capsys.disabled():
        for name, cover in (("profile", profiles), ("bootstrap", bootstraps)):
            shares = ", ".join(f"{n} {s:.0%}" for n, s in zip(TRUE, np.mean(cover, axis=0), strict=True))
            print(f"\n{name} intervals of 95 % cover: {shares}")
        print(
            f"held-out error: mean {np.mean(errors):.2%}, largest {np.max(errors):.2%}, "
            f"{np.mean(np.array(errors) <= 0.005):.0%} of predictions within 0.5 %"
        )
    for cover in (profiles, bootstraps):
        assert np.all(np.mean(cover, axis=0) >= 0.90)
        assert np.all(np.mean(cover, axis=0) <= 0.99)
    assert np.mean(errors) <= 0.005
    assert np.mean(np.array(errors) <= 0.005) >= within
