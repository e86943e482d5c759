"""The masked objective: some of a row's tokens are hidden and are to be predicted (arXiv 1810.04805)."""

from typing import cast

import numpy as np
from numpy.typing import NDArray

from ssmoe.data.packing import Batch

IGNORE = -100
"""A target that is not predicted."""


def hide(batch: Batch, *, mask_id: int, fraction: float, seed: int, number: int) -> Batch:
    """Replace round(fraction * l) ids of every row, at least one, by `mask_id`; they are the only targets.

    Which ones depends on `seed` and `number` (the rows read before this batch, say) alone.
    """
    b, length = batch.ids.shape
    generator = np.random.Philox(key=(seed % 2**64) | (number << 64))
    bits = cast(NDArray[np.uint64], generator.random_raw(b * length)).reshape(b, length)
    rank = np.argsort(np.argsort(bits, kind="stable"), kind="stable")
    hidden = rank < max(1, round(fraction * length))
    return batch._replace(
        ids=np.where(hidden, mask_id, batch.ids), targets=np.where(hidden, batch.ids, IGNORE)
    )
