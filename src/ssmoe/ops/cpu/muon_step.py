"""Muon's update on a CPU: a few matrices at a time, in bfloat16 where the hardware multiplies that."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ssmoe.ops.cpu.describe import describe
from ssmoe.ops.reference import muon_step as definition
from ssmoe.ops.reference.muon_step import Iteration

AT_ONCE = 2**20
"""Values updated together unless one matrix has more: all passes over them stay in the second cache."""

_Triple = tuple[Tensor, Tensor, Tensor]


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
    for batch in _batches(parameters, gradients, momenta):
        definition(
            *zip(*batch, strict=True),
            rate=rate,
            decay=decay,
            mu=mu,
            iteration=iteration,
            products=torch.bfloat16 if native else None,
        )


def _batches(*tensors: Sequence[Tensor]) -> Iterator[list[_Triple]]:
    """Parameter, gradient and momentum in pieces of banks, together up to AT_ONCE values."""
    first = tensors[0][0]
    most = max(1, AT_ONCE // (first.shape[1] * first.shape[2]))
    batch: list[_Triple] = []
    held = 0
    for bank in zip(*tensors, strict=True):
        for piece in zip(*(t.split(most) for t in bank), strict=True):
            if batch and held + len(piece[0]) > most:
                yield batch
                batch, held = [], 0
            batch.append(piece)
            held += len(piece[0])
    yield batch
