import random
from hashlib import blake2b

import pytest

from ssmoe.data.split import choose_held_out, describe_split


def sizes_of(count):
    return {blake2b(bytes([n % 256, n // 256]), digest_size=16).digest(): n for n in range(count)}


def test_order_changes_nothing():
    sizes = sizes_of(500)
    shuffled = list(sizes.items())
    random.Random(0).shuffle(shuffled)
    assert choose_held_out(sizes, 0.1) == choose_held_out(dict(shuffled), 0.1)


def test_adding_documents_moves_none():
    before, after = choose_held_out(sizes_of(500), 0.1), choose_held_out(sizes_of(800), 0.1)
    assert before == after & sizes_of(500).keys()


def test_fraction_is_about_right():
    assert 300 < len(choose_held_out(sizes_of(4000), 0.1)) < 500


@pytest.mark.parametrize(("fraction", "expected"), [(1e-9, 1), (0.999999, 4)])
def test_both_sides_get_a_document(fraction, expected):
    assert len(choose_held_out(sizes_of(5), fraction)) == expected


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match=r"data\.max_document_bytes=20\b"):
        choose_held_out({b"digest": 1000}, 0.02)


@pytest.mark.parametrize(("held_out", "told"), [([b"b"], True), ([b"c"], False), ([b"b", b"c"], True)])
def test_a_split_far_from_what_was_asked_for_is_told(held_out, told):
    found = describe_split({b"a": 700, b"b": 250, b"c": 50}, held_out, 0.02)
    assert (found is not None) == told
    if held_out == [b"b"]:
        assert "1 of 3 documents, which are 25% of the text and not the share of data.held_out=0.02" in found
        assert "data.max_document_bytes=20" in found


def test_a_large_fraction_that_is_met_is_not_told():
    assert describe_split({b"a": 400, b"b": 600}, [b"b"], 0.5) is None
