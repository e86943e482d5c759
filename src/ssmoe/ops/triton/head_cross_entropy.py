"""The head's cross-entropy on a GPU: torch's products around our kernel of a row's logits."""

from torch import Tensor

from ssmoe.ops.reference.head_cross_entropy import composed
from ssmoe.ops.reference.linear import linear
from ssmoe.ops.triton.cross_entropy import cross_entropy


def head_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """x (t, d), weight (vocab, d), bias (vocab,), targets (t,) -> (); see the reference."""
    return composed(linear, cross_entropy, x, weight, bias, targets)
