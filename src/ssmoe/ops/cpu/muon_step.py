"""Muon's update on a CPU: the products in bfloat16 where it multiplies that in hardware, as on a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmoe.ops.cpu.describe import describe
from ssmoe.ops.reference import muon_step as definition
from ssmoe.ops.reference.muon_step import Iteration


def muon_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    rate: float | Tensor,
    decay: float,
    mu: float,
    iteration: Iteration,
) -> None:
    """`ssmoe.ops.reference.muon_step`; parameters and momenta keep their dtype.

    Of many small matrices a product in float32 is three to four times slower where bfloat16 is native, and
    without it the opposite holds, so the level decides.
    """
    native = describe()["level"] == "Avx512Bf16" and parameters[0].dtype == torch.float32
    definition(
        parameters,
        gradients,
        momenta,
        rate=rate,
        decay=decay,
        mu=mu,
        iteration=iteration,
        products=torch.bfloat16 if native else None,
    )
