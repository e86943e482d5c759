"""Retrieval: what is alike comes first, on the layers asked for."""

import pytest
import torch

from ssmoe.model.build import build
from ssmoe.model.mixers.mamba import MambaState
from ssmoe.soup.capture import Memory, capture
from ssmoe.soup.retrieve import nearest, similarities
from tests.model.zoo import small


def memory(*vectors):
    """One vector for each of two scan layers, with a stateless layer between."""
    first, second = (MambaState(torch.zeros(1, 2, 3), torch.tensor([[v]])) for v in vectors)
    return Memory((first, (), second), (None, None, None), 1)


LIBRARY = [memory([1.0, 0], [1.0, 0]), memory([0, 3.0], [0, 1.0]), memory([-1.0, 0], [2.0, 0])]


def test_cosines_of_the_chosen_layers() -> None:
    query = memory([2.0, 0], [0, 5.0])
    torch.testing.assert_close(similarities([query], LIBRARY, [0]), torch.tensor([[1.0, 0, -1]]))
    torch.testing.assert_close(similarities([query], LIBRARY, [2]), torch.tensor([[0.0, 1, 0]]))
    torch.testing.assert_close(similarities([query], LIBRARY), torch.tensor([[0.5, 0.5, -0.5]]))
    assert nearest(query, LIBRARY, [0]) == [0, 1, 2]
    assert nearest(query, LIBRARY, [2]) == [1, 0, 2]


def test_of_equal_memories_the_earlier_one_comes_first() -> None:
    other = memory([0, 1.0], [0, 1.0])
    library = [memory([1.0, 0], [1.0, 0]) if i % 3 else other for i in range(60)]
    expected = [i for i in range(60) if i % 3] + [i for i in range(60) if not i % 3]
    assert nearest(memory([1.0, 0], [1.0, 0]), library) == expected


def test_what_all_memories_share_is_left_out() -> None:
    shared = [memory([9.0, 1], [1.0, 0]), memory([9.0, -1], [1.0, 0]), memory([9.0, 0.5], [1.0, 0])]
    query = memory([9.0, -3], [0, 1.0])
    # the mean is (9, 1/6): what is left points up, down, up and, for the query, down
    expected = torch.tensor([[-1.0, 1, -1]])
    torch.testing.assert_close(similarities([query], shared, [0], centre=True), expected)
    assert nearest(query, shared, [0], centre=True)[0] == 1
    assert float(similarities([query], shared, [0]).min()) > 0.8


def test_a_text_is_nearest_to_itself() -> None:
    model = build(small("moe-mamba")).eval()
    texts = torch.randint(61, (5, 1, 20), generator=torch.Generator().manual_seed(0))
    library = [capture(model, text) for text in texts]
    found = similarities(library, library)
    torch.testing.assert_close(found.diag(), torch.ones(5))
    assert [nearest(one, library)[0] for one in library] == list(range(5))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no memories"):
        nearest(LIBRARY[0], [])
    with pytest.raises(ValueError, match=r"layers=\[1\] must name layers with a scan: \[0, 2\]"):
        nearest(LIBRARY[0], LIBRARY, [1])
    double = LIBRARY[0]._replace(state=(MambaState(torch.zeros(2, 2, 3), torch.ones(2, 1, 2)), (), ()))
    with pytest.raises(ValueError, match="one row"):
        nearest(double, LIBRARY, [0])
