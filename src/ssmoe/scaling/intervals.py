"""95 % intervals of fitted coefficients: residual bootstrap, and the profile of the objective.

Bootstrap: the fit's residuals, raised by 1 / sqrt(1 - leverage), are drawn anew onto its predictions; every
resample is refitted and the interval runs between the 2.5 and 97.5 percentiles.

Profile: an interval holds the values at which the best fit of the other coefficients leaves a sum of squares
S with (S - S_min) / (S_min / (n - p)) <= F_0.95(1, n - p). It follows the curved valley between a and alpha,
where the bootstrap covers too little when runs are few.
"""

from collections.abc import Callable

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from ssmoe.scaling.fit import HUBER, Fit, Intervals, huber_weight, predict, to_raw

Array = NDArray[np.float64]

LEVEL = 0.95
OPEN = 25.0
"""A profile still below its threshold this many units of log from the optimum is open on that side."""


def bootstrap(fit: Fit, *, resamples: int = 400, seed: int = 0) -> Intervals:
    """Percentile intervals of the residual bootstrap."""
    if resamples < 40:
        raise ValueError(f"{resamples} resamples have no 2.5 percentile: use at least 40")
    prediction, jacobian = predict(fit.theta, fit.data, fit.form, fit.fixed_c)
    hat = jacobian @ np.linalg.pinv(jacobian)
    raised = fit.residuals / np.sqrt(1 - np.minimum(np.diag(hat), 0.99))
    drawn = np.random.default_rng(seed).choice(raised - raised.mean(), (resamples, len(raised)))
    start = np.tile(fit.theta, (resamples, 1))
    refitted = refit(start, prediction + drawn, fit)
    low, high = np.percentile(to_raw(refitted, fit.data, fit.form), (2.5, 97.5), axis=0)
    return _named(fit, low, high)


def profile(fit: Fit) -> Intervals:
    """Profile intervals; 0 or infinity where the runs leave a side open."""
    count = len(fit.theta)
    spare = len(fit.residuals) - count
    best = _half_squares(fit.theta[None], fit)[0]
    threshold = best * (1 + float(scipy.stats.f.ppf(LEVEL, 1, spare)) / spare)
    which = np.repeat(np.arange(count), 2)
    side = np.tile([-1.0, 1.0], count)
    centre = to_raw(fit.theta, fit.data, fit.form)[which]
    inside, outside = centre.copy(), np.full_like(centre, np.inf)
    theta = np.tile(fit.theta, (2 * count, 1))
    distance = np.full_like(centre, 0.05)
    for _ in range(40):
        closed = np.isfinite(outside)
        target = np.where(closed, (inside + outside) / 2, centre + side * distance)
        tried = _constrained(theta, fit, which, target)
        value = to_raw(tried, fit.data, fit.form)[np.arange(2 * count), which]
        below = _half_squares(tried, fit) <= threshold
        theta = np.where(below[:, None], tried, theta)
        inside = np.where(below, value, inside)
        outside = np.where(below, outside, value)
        distance = np.where(below & ~closed, np.minimum(distance * 2, 2 * OPEN), distance)
        if np.all(np.abs(outside - inside) < 1e-4):
            break
    edge = np.where(
        np.isfinite(outside), (inside + np.where(np.isfinite(outside), outside, 0)) / 2, side * np.inf
    )
    return _named(fit, edge[0::2], edge[1::2])


def refit(theta: Array, log_loss: Array, fit: Fit) -> Array:
    """Minimise the fit's objective for many losses at once. theta: (m, p), log_loss: (m, n) -> (m, p)."""

    def residuals(theta: Array) -> tuple[Array, Array]:
        prediction, jacobian = predict(theta, fit.data, fit.form, fit.fixed_c)
        return log_loss - prediction, jacobian

    return _levenberg_marquardt(theta, residuals)


def _constrained(theta: Array, fit: Fit, which: NDArray[np.intp], target: Array) -> Array:
    """The best fits with one raw coefficient each drawn to a target by one more, heavy, residual.

    Whatever value the coefficient reaches, the other coefficients are optimal for it.
    """
    weight = 1e3 * float(np.sqrt(np.mean(fit.residuals**2)))
    rows = np.arange(len(theta))

    def residuals(theta: Array) -> tuple[Array, Array]:
        prediction, jacobian = predict(theta, fit.data, fit.form, fit.fixed_c)
        raw = to_raw(theta, fit.data, fit.form)[rows, which]
        pull = weight * (target - raw)[:, None]
        slope = weight * _raw_slopes(theta, fit)[rows, which][:, None]
        plain = fit.data.log_loss - prediction
        return np.concatenate([plain, pull], axis=-1), np.concatenate([jacobian, slope], axis=-2)

    return _levenberg_marquardt(theta, residuals)


def _levenberg_marquardt(
    theta: Array, residuals: Callable[[Array], tuple[Array, Array]], steps: int = 60
) -> Array:
    """Weighted least squares by damped Gauss-Newton steps, many problems at once."""
    damping = np.full(len(theta), 1e-3)
    left, jacobian = residuals(theta)
    value = _huber(left)
    for _ in range(steps):
        weighted = jacobian * huber_weight(left)[..., None]
        curvature: Array = np.einsum("mnp,mnq->mpq", weighted, jacobian)
        slope: Array = np.einsum("mnp,mn->mp", weighted, left)
        diagonal = np.einsum("mpp->mp", curvature)
        curvature += (damping[:, None] * diagonal + 1e-15)[:, :, None] * np.eye(theta.shape[-1])
        step = np.clip(np.linalg.solve(curvature, slope[..., None])[..., 0], -2, 2)
        new = residuals(theta + step)
        new_value = _huber(new[0])
        better = new_value <= value
        theta = np.where(better[:, None], theta + step, theta)
        value = np.where(better, new_value, value)
        left = np.where(better[:, None], new[0], left)
        jacobian = np.where(better[:, None, None], new[1], jacobian)
        damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-12, 1e8)
        if np.all(np.abs(step) < 1e-7):
            break
    return theta


def _huber(residuals: Array) -> Array:
    size = np.abs(residuals)
    return np.where(size <= HUBER, residuals**2 / 2, HUBER * (size - HUBER / 2)).sum(axis=-1)


def _half_squares(theta: Array, fit: Fit) -> Array:
    prediction, _ = predict(theta, fit.data, fit.form, fit.fixed_c)
    return _huber(fit.data.log_loss - prediction)


def _raw_slopes(theta: Array, fit: Fit) -> Array:
    """Derivatives of the raw logarithms by theta, (m, p, p)."""
    count = theta.shape[-1]
    slopes = np.tile(np.eye(count), (len(theta), 1, 1))
    slopes[:, 0, 1] = np.exp(theta[:, 1]) * np.log(fit.data.scale[0])
    slopes[:, 2, 3] = np.exp(theta[:, 3]) * np.log(fit.data.scale[1])
    if fit.form == "fine-grained":
        slopes[:, 4, 1] = slopes[:, 0, 1]
    return slopes


def _named(fit: Fit, low: Array, high: Array) -> Intervals:
    with np.errstate(over="ignore"):
        pairs = zip(np.exp(low).tolist(), np.exp(high).tolist(), strict=True)
    return dict(zip(fit.names, pairs, strict=True))
