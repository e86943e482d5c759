"""The order in which an epoch's rows are read: far from the rows that they continue.

Rows are cut from one stream, so the last target of a row is the first token of the next. A layer that mixes
the rows of a batch (Mixture of Tokens, expert choice) could show a row that target, were both in one batch.
"""

from itertools import count
from math import gcd

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0.381966
"""1 less the inverse of the golden ratio: its multiples, modulo 1, spread most evenly."""


def scatter(positions: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """The row read at each position of an epoch of `rows` rows; every row has one position.

    Row r is read at position r * d modulo `rows`, where d is the number nearest to 0.38 `rows` that shares no
    factor with it, so that a row and its continuation are `distance(rows)` positions apart or more.
    """
    return positions * pow(_step(rows), -1, rows) % rows if rows else positions


def distance(rows: int) -> int:
    """The fewest positions between a row and its continuation: a quarter of 10 rows or more."""
    step = _step(rows)
    return min(step, rows - step)


def _step(rows: int) -> int:
    """1 shares no factor with any number, so the search ends."""
    target = round(_GOLDEN * rows)
    near = (target + sign * away for away in count() for sign in (-1, 1))
    return next(step for step in near if step >= 1 and gcd(step, rows) == 1)
