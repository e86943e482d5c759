"""Segments: padding, starts, slices."""

import torch

from ssmoe.ops import Segments

SEGMENTS = Segments(
    torch.tensor([[0, 0, 1, -1]], dtype=torch.int32), torch.tensor([[True, False, True, True]])
)


def test_real_is_what_is_not_padding() -> None:
    assert SEGMENTS.real.tolist() == [[True, True, True, False]]


def test_a_start_on_padding_resets_nothing() -> None:
    assert SEGMENTS.resets.tolist() == [[True, False, True, False]]


def test_slice_takes_columns_of_both() -> None:
    piece = SEGMENTS.slice(1, 3)
    assert piece.ids.tolist() == [[0, 1]]
    assert piece.starts.tolist() == [[False, True]]
