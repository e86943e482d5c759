"""The definition of Muon's update, against singular value decompositions in float64."""

import pytest
import torch

from ssmoe.ops.reference.muon_step import muon_step, orthogonalise
from ssmoe.training.muon import JORDAN, POLAR

BOTH = pytest.mark.parametrize("iteration", [JORDAN, POLAR], ids=["jordan", "polar"])
SHAPES = [(5, 7), (7, 5), (6, 6), (1, 9), (9, 1), (40, 24)]


def textbook(matrix, iteration):
    """The iteration for one matrix, in float64, as a polynomial of its singular values."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.square().norm().sqrt() if iteration.tight else s.norm())
    for a, b, c in iteration.coefficients:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_of_a_batch_is_the_polynomial_of_its_singular_values(shape, iteration):
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1)
    expected = torch.stack([textbook(matrix, iteration) for matrix in x])
    torch.testing.assert_close(orthogonalise(x, iteration), expected, rtol=0, atol=1e-9)


@BOTH
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_values_come_near_one(dtype, error, shape, iteration):
    torch.manual_seed(0)
    x = torch.randn(4, *shape) * torch.logspace(-1, 0, shape[1])
    exact = orthogonalise(x.double(), iteration)
    found = orthogonalise(x.to(dtype), iteration)
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.double())
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert ((found.double() - exact).norm() / exact.norm()) < error


@pytest.mark.parametrize(
    ("iteration", "smallest", "lowest", "highest"),
    [(JORDAN, 0.0016, 0.68, 1.21), (POLAR, 0.0031, 0.78, 1.21)],
)
def test_the_range_that_is_claimed(iteration, smallest, lowest, highest):
    s = torch.logspace(torch.tensor(smallest).log10().item(), 0, 5000, dtype=torch.float64)
    for a, b, c in iteration.coefficients:
        s = a * s + b * s**3 + c * s**5
    assert s.min() > lowest
    assert s.max() < highest


@BOTH
def test_zeros_stay_zeros(iteration):
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 4), iteration), torch.zeros(2, 3, 4))


@BOTH
@pytest.mark.parametrize("held", [False, True], ids=["number", "tensor"])
def test_the_formula_in_float64(iteration, held):
    """Momentum, Nesterov's step, decay and the factor, for two banks at once."""
    torch.manual_seed(0)
    rate, decay, mu = 0.03, 0.2, 0.9
    parameters = [torch.randn(n, 6, 10, dtype=torch.float64) for n in (2, 1)]
    momenta = [torch.zeros_like(p) for p in parameters]
    expected, means = [p.clone() for p in parameters], [m.clone() for m in momenta]
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in parameters]
        given = torch.tensor(rate, dtype=torch.float64) if held else rate
        muon_step(parameters, gradients, momenta, rate=given, decay=decay, mu=mu, iteration=iteration)
        for i, gradient in enumerate(gradients):
            means[i] = mu * means[i] + (1 - mu) * gradient
            nesterov = mu * means[i] + (1 - mu) * gradient
            direction = torch.stack([textbook(matrix, iteration) for matrix in nesterov])
            expected[i] = (1 - rate * decay) * expected[i] - rate * 0.2 * 10**0.5 * direction
    for found, wanted in zip((*parameters, *momenta), (*expected, *means), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
