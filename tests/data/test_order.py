from itertools import pairwise

import numpy as np
import pytest

from ssmoe.data.order import distance, scatter


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 9, 10, 24, 30, 64, 210, 997, 2310, 30030])
def test_every_row_has_one_position_far_from_the_next_rows(rows):
    order = scatter(np.arange(rows), rows)
    assert sorted(order.tolist()) == list(range(rows))
    position = np.argsort(order)
    apart = [abs(one - other) for one, other in pairwise(position.tolist())]
    assert min(apart, default=distance(rows)) >= distance(rows)


def test_the_distance_is_a_quarter_of_the_rows_at_least():
    ratios = [distance(rows) / rows for rows in range(10, 5000)]
    assert min(ratios) >= 0.25
    assert min(ratios[300:]) > 0.35


def test_neighbours_in_reading_order_are_not_neighbours_in_the_text():
    for rows in range(1000, 1200):
        order = scatter(np.arange(rows), rows)
        jumps = np.abs(np.diff(order))
        assert jumps.min() > 12


def test_large_epochs_do_not_overflow():
    rows = 2**31 - 1
    found = scatter(np.array([rows - 1]), rows)
    assert 0 <= found[0] < rows
