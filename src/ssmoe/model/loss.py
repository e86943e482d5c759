"""The sum of the head's cross-entropy and the routers' losses."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.model.layer import RouterStats
from ssmoe.ops import Ops, load
from ssmoe.ops.reference.cross_entropy import IGNORE


class Loss(NamedTuple):
    """total: () what to minimise, lm + balance + z. lm: () mean cross-entropy in nats over the targets.

    balance, z: () sums over the layers, coefficients applied. tokens: () int64, targets that count.
    """

    total: Tensor
    lm: Tensor
    balance: Tensor
    z: Tensor
    tokens: Tensor


def model_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Sequence[RouterStats],
    ops: Ops | None = None,
) -> Loss:
    """The loss of x (b, l, d), the head's input, under weight (vocab, d) and bias (vocab,).

    targets: (b, l) int64, `IGNORE` where nothing is predicted. ops: the kernels, by default the definitions.
    """
    flat = targets.reshape(-1)
    tokens = (flat != IGNORE).sum()
    lm = (ops or load("reference")).head_cross_entropy(x.reshape(flat.shape[0], -1), weight, bias, flat)
    zero = torch.zeros_like(lm)
    balance = torch.stack([zero, *(s.balance for s in stats)]).sum()
    z = torch.stack([zero, *(s.z for s in stats)]).sum()
    return Loss(lm + balance + z, lm, balance, z, tokens)
