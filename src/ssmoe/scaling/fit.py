"""Runs to coefficients, by the method of arXiv 2402.07871: the Huber loss of log L, minimised by BFGS.

    minimise  mean_i huber_0.1(log L_i - log L(N_i, D_i, G_i))   over  log a, log alpha, log b, ...

c is fixed, as the authors fix it, or fitted too. N and D are measured in units of their geometric means while
fitting, which leaves the optimum where it is and makes a near-zero start (every parameter 1) a sensible one.
The authors' small norm penalty is left out: it shrinks coefficients towards 1 in units that mean nothing.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from ssmoe.scaling.cost import Blocks
from ssmoe.scaling.design import check_design, check_identified
from ssmoe.scaling.law import Coefficients, Law, Range, loss
from ssmoe.scaling.runs import Point

Array = NDArray[np.float64]
Form = Literal["fine-grained", "dense"]
Intervals = dict[str, tuple[float, float]]

HUBER = 0.1
TOLERANCE = 1e-9
"""Of the objective's slopes: 1 % noise is a mean Huber loss of 5e-5, whose slopes are below BFGS's usual 1e-5
far from the optimum."""
PAPER_C = 0.472
"""The authors' `scaling_bias`, shared by their dense and MoE fits."""
NAMES = ("a", "alpha", "b", "beta", "g", "gamma", "c")


class Data(NamedTuple):
    """Runs as arrays, each (n,), N and D in units of `scale`."""

    parameters: Array
    tokens: Array
    granularity: Array
    log_loss: Array
    scale: tuple[float, float]


class Fit(NamedTuple):
    """The coefficients and what they leave unexplained."""

    coefficients: Coefficients
    form: Form
    fixed_c: float | None
    theta: Array
    """Logarithms of the free coefficients in the data's units."""
    data: Data
    residuals: Array
    """log L - log L(N, D, G), one a run."""
    objective: float

    @property
    def rmse(self) -> float:
        """Root mean squared error in nats."""
        measured = np.exp(self.data.log_loss)
        return float(np.sqrt(np.mean((measured - np.exp(self.data.log_loss - self.residuals)) ** 2)))

    @property
    def names(self) -> tuple[str, ...]:
        """The free coefficients in the order of `theta`."""
        return free_names(self.form, self.fixed_c)


def fit(
    points: Sequence[Point],
    *,
    form: Form = "fine-grained",
    c: float | None = PAPER_C,
    method: Literal["paper", "multistart"] = "paper",
) -> Fit:
    """Fit a law to runs. `c` None fits it too. "paper" starts once, near zero; "multistart" also at the
    points of a grid, 27 of them or 9.

    Raises ValueError, with the reason, for runs that cannot identify a coefficient.
    """
    check_design(points, form=form, c=c)
    data = as_data(points)
    starts = [np.full(len(free_names(form, c)), 1e-5)]
    if method == "multistart":
        starts += _grid(form, c)
    best = min((_bfgs(start, data, form, c) for start in starts), key=lambda result: result[1])
    theta, objective = best
    prediction, jacobian = predict(theta, data, form, c)
    check_identified(jacobian, free_names(form, c))
    return Fit(
        coefficients=to_coefficients(theta, data, form, c),
        form=form,
        fixed_c=c,
        theta=theta,
        data=data,
        residuals=data.log_loss - prediction,
        objective=objective,
    )


def to_law(
    found: Fit, points: Sequence[Point], *, name: str, blocks: Blocks, expansion: float, intervals: Intervals
) -> Law:
    """A fit as a law that `ssmoe plan --law` reads. `intervals`: 95 %, by coefficient."""
    sizes, tokens, grains = (
        [getattr(point, field) for point in points] for field in ("parameters", "tokens", "granularity")
    )
    return Law(
        name=name,
        source=f"fitted to {len(points)} runs",
        blocks=blocks,
        expansion=expansion,
        coefficients=found.coefficients,
        valid=Range(
            parameters=(min(sizes), max(sizes)),
            tokens=(min(tokens), max(tokens)),
            granularity=(round(min(grains)), round(max(grains))),
        ),
        rmse=found.rmse,
        intervals=intervals,
    )


def relative_errors(found: Fit, points: Sequence[Point]) -> list[float]:
    """(predicted - measured) / measured of runs that were held out."""
    if not points:
        return []
    law = to_law(found, points, name="fit", blocks="mamba-moe", expansion=1, intervals={})
    return [loss(law, p.parameters, p.tokens, p.granularity) / p.loss - 1 for p in points]


def free_names(form: Form, c: float | None) -> tuple[str, ...]:
    """The coefficients that a fit varies."""
    names = NAMES[:4] if form == "dense" else NAMES[:6]
    return names if c is not None else (*names, "c")


def as_data(points: Sequence[Point]) -> Data:
    """Runs as arrays in units of their geometric means."""
    size, tokens, granularity, measured = (
        np.array([getattr(point, name) for point in points], dtype=np.float64)
        for name in ("parameters", "tokens", "granularity", "loss")
    )
    scale = (float(np.exp(np.log(size).mean())), float(np.exp(np.log(tokens).mean())))
    return Data(size / scale[0], tokens / scale[1], granularity, np.log(measured), scale)


def predict(theta: Array, data: Data, form: Form, c: float | None) -> tuple[Array, Array]:
    """log L and its derivative by theta. theta: (..., p) -> (..., n), (..., n, p)."""
    # a line search may try absurd exponents
    values = np.exp(np.clip(theta, -30, 4))[..., None, :]
    a, alpha, b, beta = (values[..., i] for i in range(4))
    small, short = data.parameters**-alpha, b * data.tokens**-beta
    coarse = (
        values[..., 4] * data.granularity ** -values[..., 5] if form == "fine-grained" else np.zeros_like(a)
    )
    constant = values[..., -1] if c is None else np.full_like(a, c)
    size = (a + coarse) * small
    total = constant + size + short
    columns = [
        a * small,
        -size * alpha * np.log(data.parameters),
        short,
        -short * beta * np.log(data.tokens),
    ]
    if form == "fine-grained":
        columns += [coarse * small, -coarse * small * values[..., 5] * np.log(data.granularity)]
    if c is None:
        columns.append(constant * np.ones_like(total))
    return np.log(total), np.stack(columns, axis=-1) / total[..., None]


def to_raw(theta: Array, data: Data, form: Form) -> Array:
    """Logarithms of the coefficients in parameters and tokens instead of the data's units."""
    raw = theta.copy()
    raw[..., 0] += np.exp(theta[..., 1]) * np.log(data.scale[0])
    raw[..., 2] += np.exp(theta[..., 3]) * np.log(data.scale[1])
    if form == "fine-grained":
        raw[..., 4] += np.exp(theta[..., 1]) * np.log(data.scale[0])
    return raw


def to_coefficients(theta: Array, data: Data, form: Form, c: float | None) -> Coefficients:
    """The law's numbers."""
    values = dict(zip(free_names(form, c), np.exp(to_raw(theta, data, form)).tolist(), strict=True))
    return Coefficients(**(values if c is None else {**values, "c": c}))


def huber_weight(residuals: Array) -> Array:
    """The weight with which least squares imitates the Huber loss."""
    return HUBER / np.maximum(np.abs(residuals), HUBER)


def _bfgs(start: Array, data: Data, form: Form, c: float | None) -> tuple[Array, float]:
    """The optimum reached from a start, and the objective there; infinite where it diverged."""
    options = {"gtol": TOLERANCE, "maxiter": 2000}
    result = cast(
        Any,
        scipy.optimize.minimize(
            _objective, start, args=(data, form, c), jac=True, method="BFGS", options=options
        ),
    )
    value = float(result.fun)
    return np.asarray(result.x, dtype=np.float64), value if np.isfinite(value) else float("inf")


def _objective(theta: Array, data: Data, form: Form, c: float | None) -> tuple[float, Array]:
    prediction, jacobian = predict(theta, data, form, c)
    residuals = data.log_loss - prediction
    size = np.abs(residuals)
    value = np.where(size <= HUBER, residuals**2 / 2, HUBER * (size - HUBER / 2)).mean()
    gradient = -(np.clip(residuals, -HUBER, HUBER)[:, None] * jacobian).mean(axis=0)
    return float(value), gradient


def _grid(form: Form, c: float | None) -> list[Array]:
    """Starts at several exponents; in the data's units the factors are of the order of the loss."""
    starts: list[Array] = []
    for alpha in (0.05, 0.15, 0.5):
        for beta in (0.05, 0.15, 0.5):
            for gamma in (0.2, 0.6, 1.5) if form == "fine-grained" else (0.0,):
                start = [1.0, alpha, 1.0, beta]
                start += [0.3, gamma] if form == "fine-grained" else []
                start += [0.5] if c is None else []
                starts.append(np.log(np.array(start)))
    return starts
