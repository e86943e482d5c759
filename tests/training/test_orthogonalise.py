import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssmoe.training.orthogonalise import COEFFICIENTS, flops, orthogonalise


def textbook(matrix):
    """The iteration for one matrix, in float64, as a polynomial of its singular values."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


SHAPES = [(5, 7), (7, 5), (6, 6), (1, 9), (9, 1), (40, 24)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_of_a_batch_is_the_polynomial_of_its_singular_values(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1)
    expected = torch.stack([textbook(matrix) for matrix in x])
    torch.testing.assert_close(orthogonalise(x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_values_come_near_one(dtype, error, shape):
    torch.manual_seed(0)
    x = torch.randn(4, *shape) * torch.logspace(-1, 0, shape[1])
    exact = orthogonalise(x.double())
    found = orthogonalise(x.to(dtype))
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.double())
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert ((found.double() - exact).norm() / exact.norm()) < error


def test_zeros_stay_zeros():
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_flops_are_those_that_torch_counts():
    for shape in ((3, 16, 40), (3, 40, 16)):
        with FlopCounterMode(display=False) as counter:
            orthogonalise(torch.randn(shape))
        assert counter.get_total_flops() == flops(*shape)
