"""What is drawn of states: norms, steps, similarity and places, from the tensors of their files."""

import pytest
import torch

from ssmoe.soup.picture import overview


def state(first, second, steps=None):
    tensors = {
        "layers.10.ssm": torch.tensor([[second]]),
        "layers.2.ssm": torch.tensor([[first]]),
        "layers.2.conv": torch.ones(1, 2, 3),
    }
    return tensors if steps is None else tensors | {"extra.steps.2": torch.tensor([steps])}


STATES = {
    "a": state([3.0, 4], [1.0, 0], [1.0, 3.0]),
    "b": state([6.0, 8], [0, 2.0]),
    "c": state([-4.0, 3], [0, 1.0]),
}


def test_norms_steps_and_similarity() -> None:
    found = overview(STATES)
    assert found.layers == ("2", "10")
    torch.testing.assert_close(found.norms, torch.tensor([[5.0, 1], [10, 2], [5, 1]]).double())
    assert found.steps[0].tolist()[0] == 2
    assert torch.isnan(found.steps).tolist() == [[False, True], [True, True], [True, True]]
    expected = torch.tensor([[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]).double()
    torch.testing.assert_close(found.similarity, expected)


def test_places_keep_distances_that_lie_in_a_plane() -> None:
    found = overview(STATES)
    # layers of length 1: squared distances are 2 (1 - cosine), added over the layers
    wanted = (4 * (1 - found.similarity)).clamp(min=0).sqrt()
    torch.testing.assert_close(torch.cdist(found.places, found.places), wanted, rtol=0, atol=1e-7)
    assert overview({"a": STATES["a"]}).places.tolist() == [[0, 0]]


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no state with a scan"):
        overview({})
    with pytest.raises(ValueError, match="b has other layers"):
        overview({"a": STATES["a"], "b": {"layers.2.ssm": torch.ones(1, 1, 2)}})
