import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from ssmoe.data.loader import Cursor, batches, held_out_batches
from ssmoe.data.order import distance, scatter
from ssmoe.data.packing import pack, shuffled


def take(corpus, count, *, cursor=Cursor(), **options):  # noqa: B008
    options = {"context": 7, "batch_size": 4, "seed": 3} | options
    return list(islice(batches(corpus, cursor=cursor, **options), count))


def assert_equal(left, right):
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def corpus(random_corpus):
    return random_corpus(np.random.default_rng(0))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_rows_of_an_epoch_follow_those_of_the_one_before(corpus, batch_size):
    rows_an_epoch = corpus.num_targets // 7
    order = scatter(np.arange(rows_an_epoch), rows_an_epoch)
    epochs = [
        pack(corpus, shuffled(corpus.num_documents, seed=3, epoch=epoch)).rows(order, 7) for epoch in range(4)
    ]
    expected = [np.concatenate(arrays) for arrays in zip(*epochs, strict=True)]
    count = 4 * rows_an_epoch // batch_size
    assert count > 0
    drawn = [batch for batch, _ in take(corpus, count, batch_size=batch_size)]
    found = [np.concatenate(arrays) for arrays in zip(*drawn, strict=True)]
    assert_equal(found, [array[: count * batch_size] for array in expected])


def test_restart_from_any_cursor_equals_never_stopping(corpus):
    whole = take(corpus, 40)
    for stop in range(39):
        cursor = Cursor(**json.loads(json.dumps(whole[stop][1]._asdict())))
        batch, after = take(corpus, 1, cursor=cursor)[0]
        assert_equal(batch, whole[stop + 1][0])
        assert after == whole[stop + 1][1]


def test_restart_with_another_batch_size_goes_on_with_the_next_row(corpus):
    rows = np.concatenate([batch.ids for batch, _ in take(corpus, 10)])
    _, cursor = take(corpus, 3)[-1]
    found = np.concatenate([batch.ids for batch, _ in take(corpus, 4, cursor=cursor, batch_size=2)])
    np.testing.assert_array_equal(found, rows[12:20])


def follows(batch):
    """The pairs of rows of which the second goes on where the first ended, in a corpus of distinct tokens."""
    opens = {int(row[0]): number for number, row in enumerate(batch.ids)}
    ends = [int(row[-1]) for row in batch.targets]
    return [(number, opens[end]) for number, end in enumerate(ends) if end in opens]


@pytest.mark.parametrize("batch_size", [2, 8, 16, 20])
def test_no_batch_holds_a_row_and_its_continuation(corpus_of, batch_size):
    """Nor does, then, any group of a layer that mixes the rows of a batch."""
    corpus = corpus_of([list(range(400))])
    rows_an_epoch = corpus.num_targets // 7
    assert batch_size <= distance(rows_an_epoch)
    for batch, _ in take(corpus, 3 * rows_an_epoch // batch_size, batch_size=batch_size):
        assert not follows(batch)
    # what the check would find in the order of the stream
    assert len(follows(pack(corpus, np.arange(1)).rows(np.arange(4), 7))) == 3


@pytest.mark.parametrize("rows", [0, 57, 40])
def test_no_held_out_batch_holds_a_row_and_its_continuation(corpus_of, rows):
    corpus = corpus_of([list(range(400))])
    drawn = list(held_out_batches(corpus, context=7, batch_size=8, rows=rows))
    assert len(drawn) > 4
    assert not any(follows(batch) for batch in drawn)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_concatenate_to_the_batch_of_one(corpus, world_size):
    alone = take(corpus, 20, batch_size=6)
    ranks = [take(corpus, 20, batch_size=6, rank=rank, world_size=world_size) for rank in range(world_size)]
    for (batch, cursor), *shares in zip(alone, *ranks, strict=True):
        joined = [np.concatenate(arrays) for arrays in zip(*(share for share, _ in shares), strict=True)]
        assert_equal(joined, batch)
        assert {after for _, after in shares} == {cursor}


def test_every_document_comes_once_an_epoch(corpus_of):
    # 40 documents of one distinct token each: the stream is END t END t ..., of 80 targets
    corpus = corpus_of([[token] for token in range(40)])
    for epoch in range(3):
        drawn = take(corpus, 10, context=8, batch_size=1, cursor=Cursor(rows=10 * epoch))
        targets = np.concatenate([batch.targets[0] for batch, _ in drawn])
        assert Counter(targets[targets != 999].tolist()) == dict.fromkeys(range(40), 1)
        assert np.count_nonzero(targets == 999) == 40


def test_other_epochs_and_seeds_have_other_orders(corpus_of):
    corpus = corpus_of([[token] for token in range(40)])
    first, second = take(corpus, 2, context=80, batch_size=1)
    other, _ = take(corpus, 1, context=80, batch_size=1, seed=4)[0]
    assert not np.array_equal(first[0].ids, second[0].ids)
    assert not np.array_equal(first[0].ids, other.ids)


def test_too_little_text_for_a_row(corpus_of):
    corpus = corpus_of([[1, 2, 3]])
    assert take(corpus, 1, context=4)
    with pytest.raises(ValueError, match=r"data\.context=5 .* set data\.context to at most 4 or add text"):
        batches(corpus, context=5, batch_size=1, seed=0, cursor=Cursor())


def test_batch_size_must_divide_among_ranks(corpus):
    with pytest.raises(ValueError, match=r"batch_size=4 .* 3 ranks: use 6"):
        take(corpus, 1, batch_size=4, rank=0, world_size=3)


@pytest.mark.parametrize("seed", range(20))
def test_held_out_covers_every_target_once(random_corpus, seed):
    generator = np.random.default_rng(seed)
    corpus = random_corpus(generator)
    context, batch_size = (int(number) for number in generator.integers(1, 20, size=2))
    drawn = list(held_out_batches(corpus, context=context, batch_size=batch_size, rows=0))
    found = sorted(tuple(row) for batch in drawn for row in batch.targets.tolist())
    documents = [[*corpus.document(number), 999] for number in range(corpus.num_documents)]
    targets = [int(token) for document in documents for token in document]
    rows = [targets[begin : begin + context] for begin in range(0, len(targets), context)]
    assert found == sorted(map(tuple, rows))
    assert len(targets) == corpus.num_targets
    assert all(len(batch.ids) <= batch_size for batch in drawn)


def test_held_out_sample_is_spread_over_the_corpus(corpus):
    context = 3
    everything = pack(corpus, np.arange(corpus.num_documents))
    drawn = list(held_out_batches(corpus, context=context, batch_size=4, rows=10))
    assert [len(batch.ids) for batch in drawn] == [4, 4, 2]
    sample = np.arange(10) * (corpus.num_targets // context) // 10
    expected = everything.rows(sample[scatter(np.arange(10), 10)], context)
    np.testing.assert_array_equal(np.concatenate([batch.ids for batch in drawn]), expected.ids)


def test_held_out_with_more_rows_than_there_are_is_everything(corpus):
    options = {"context": 7, "batch_size": 4}
    everything = list(held_out_batches(corpus, **options))
    for left, right in zip(everything, held_out_batches(corpus, rows=1000, **options), strict=True):
        assert_equal(left, right)


def test_as_many_held_out_rows_as_there_are_leave_the_shorter_one_out(corpus):
    full, rest = divmod(corpus.num_targets, 7)
    assert rest
    drawn = list(held_out_batches(corpus, context=7, batch_size=4, rows=full))
    assert [batch.ids.shape[1] for batch in drawn] == [7] * len(drawn)
    assert sum(len(batch.ids) for batch in drawn) == full


def test_held_out_shorter_than_a_row(corpus_of):
    (batch,) = held_out_batches(corpus_of([[1, 2]]), context=100, batch_size=4, rows=64)
    assert batch.ids.tolist() == [[999, 1, 2]]
    assert batch.targets.tolist() == [[1, 2, 999]]


def test_consecutive_rows_go_on_where_they_ended(corpus):
    rows_an_epoch = corpus.num_targets // 7
    an_epoch = rows_an_epoch // 4
    stream = pack(corpus, shuffled(corpus.num_documents, seed=3, epoch=1))
    drawn = take(corpus, 2 * an_epoch, consecutive=True)
    for row in range(4):
        wanted = stream.rows(np.arange(row * an_epoch, (row + 1) * an_epoch), 7)
        found = [batch for batch, _ in drawn[an_epoch:]]
        np.testing.assert_array_equal(np.concatenate([b.ids[row] for b in found]), wanted.ids.ravel())
        np.testing.assert_array_equal(np.concatenate([b.targets[row] for b in found]), wanted.targets.ravel())
        starts = wanted.starts.ravel().copy()
        starts[0] = True
        np.testing.assert_array_equal(np.concatenate([b.starts[row] for b in found]), starts)
    again = take(corpus, 3, cursor=drawn[4][1], consecutive=True)
    for (one, cursor), (other, expected) in zip(again, drawn[5:8], strict=True):
        assert_equal(one, other)
        assert cursor == expected


def test_too_few_tokens_for_a_consecutive_batch(corpus):
    with pytest.raises(ValueError, match=r"lower train\.batch_size, train\.tbptt"):
        take(corpus, 1, batch_size=10_000, consecutive=True)
