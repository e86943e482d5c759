"""Which tokens are hidden: a fixed number a row, the only targets, the same every time."""

import numpy as np

from ssmoe.data.masking import IGNORE, hide
from ssmoe.data.packing import Batch


def batch() -> Batch:
    ids = np.arange(60, dtype=np.int64).reshape(3, 20)
    return Batch(ids, ids + 1, np.zeros((3, 20), np.int32), np.zeros((3, 20), np.bool_))


def test_hidden_tokens_are_the_only_targets() -> None:
    before, after = batch(), hide(batch(), mask_id=99, fraction=0.15, seed=0, number=0)
    hidden = after.ids == 99
    assert hidden.sum(1).tolist() == [3, 3, 3]
    assert (after.targets[hidden] == before.ids[hidden]).all()
    assert (after.targets[~hidden] == IGNORE).all()
    assert (after.ids[~hidden] == before.ids[~hidden]).all()


def test_at_least_one_is_hidden() -> None:
    assert (hide(batch(), mask_id=99, fraction=0.001, seed=0, number=0).ids == 99).sum(1).tolist() == [1] * 3


def test_the_choice_depends_on_seed_and_number() -> None:
    def ids(seed: int, number: int) -> bytes:
        return hide(batch(), mask_id=99, fraction=0.3, seed=seed, number=number).ids.tobytes()

    assert ids(1, 2) == ids(1, 2)
    assert len({ids(1, 2), ids(1, 3), ids(2, 2)}) == 3
