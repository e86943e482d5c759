"""The greedy choice among logits."""

from torch import Tensor


def argmax(x: Tensor) -> Tensor:
    """The index of the first largest number of each row: (b, n), n >= 1, any dtype -> (b,) int64.

    NaN is larger than any number.
    """
    return x.argmax(dim=-1)
