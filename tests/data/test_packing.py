import numpy as np
import pytest

from ssmoe.data.packing import pack, shuffled


def materialise(corpus, order):
    """The whole stream and the number of the document at each place, by the plainest loop."""
    tokens, documents = [], []
    for number, document in enumerate(order):
        piece = [corpus.end_id, *corpus.document(document).tolist()]
        tokens += piece
        documents += [number] * len(piece)
    return [*tokens, corpus.end_id], documents


@pytest.mark.parametrize("seed", range(30))
def test_rows_equal_the_materialised_stream(random_corpus, seed):
    generator = np.random.default_rng(seed)
    corpus = random_corpus(generator)
    order = shuffled(corpus.num_documents, seed=seed, epoch=0)
    tokens, documents = materialise(corpus, order)
    context = int(generator.integers(1, corpus.num_targets + 1))
    # in any order, as a cursor may ask for any row
    numbers = generator.permutation(corpus.num_targets // context)
    batch = pack(corpus, order).rows(numbers, context)
    for row, first in enumerate(numbers * context):
        end = first + context
        assert batch.ids[row].tolist() == tokens[first:end]
        assert batch.targets[row].tolist() == tokens[first + 1 : end + 1]
        assert batch.documents[row].tolist() == [number - documents[first] for number in documents[first:end]]
        assert batch.starts[row].tolist() == [token == corpus.end_id for token in tokens[first:end]]


def test_example(corpus_of):
    corpus = corpus_of([[1, 2, 3], [], [4]])
    batch = pack(corpus, np.array([2, 0, 1])).rows(np.array([0, 1]), 3)
    assert batch.ids.tolist() == [[999, 4, 999], [1, 2, 3]]
    assert batch.targets.tolist() == [[4, 999, 1], [2, 3, 999]]
    assert batch.documents.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch.starts.tolist() == [[True, False, True], [False, False, False]]


def test_last_row_may_be_shorter(corpus_of):
    batch = pack(corpus_of([[1, 2, 3], [4]]), np.array([0, 1])).rows(np.array([1]), 4)
    assert batch.ids.tolist() == [[999, 4]]
    assert batch.targets.tolist() == [[4, 999]]
    assert batch.documents.tolist() == [[0, 0]]


def test_documents_without_tokens_are_only_ends(corpus_of):
    batch = pack(corpus_of([[], []]), np.array([0, 1])).rows(np.array([0]), 2)
    assert batch.ids.tolist() == batch.targets.tolist() == [[999, 999]]
    assert batch.documents.tolist() == [[0, 1]]


def test_dtypes(corpus_of):
    batch = pack(corpus_of([[1, 2]]), np.array([0])).rows(np.array([0]), 2)
    assert [array.dtype for array in batch] == [np.int64, np.int64, np.int32, np.bool_]


def test_shuffled_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = [shuffled(50, seed=seed, epoch=epoch).tolist() for seed in (0, 1, -1) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
    assert shuffled(50, seed=1, epoch=2).tolist() == orders[5]


def test_shuffled_never_changes():
    # a run that resumes under another version of numpy must go on with the same documents
    assert shuffled(10, seed=7, epoch=3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]
