"""Batches from a corpus, where the place in the data is one number: the rows consumed so far."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssmoe.data.corpus import TokenCorpus
from ssmoe.data.order import scatter
from ssmoe.data.packing import Batch, Stream, pack, shuffled


class Cursor(NamedTuple):
    """Where training is in the data, whatever the batch size and the number of ranks; `_asdict()` is JSON."""

    rows: int = 0


def batches(
    corpus: TokenCorpus,
    *,
    context: int,
    batch_size: int,
    seed: int,
    cursor: Cursor,
    rank: int = 0,
    world_size: int = 1,
    consecutive: bool = False,
) -> Iterator[tuple[Batch, Cursor]]:
    """Endless training batches from `cursor` on, each with the cursor that follows it.

    Every epoch has its own order of documents, and leaves out what does not fill a last row. Its rows are
    read in the order of `scatter`, so that no batch of up to `distance(rows of an epoch)` rows holds a row
    and its continuation. Of the `batch_size` rows a rank gets its share; the shares in rank order are the
    batch of a single rank.

    consecutive: row i of a batch goes on where row i of the batch before ended, until the epoch ends; the
    first batch of an epoch has starts in its first column. An epoch then leaves out what does not fill a last
    batch, and `cursor` must lie between batches.
    """
    _check(corpus, context, batch_size, world_size, consecutive=consecutive)
    assert 0 <= rank < world_size
    rows_an_epoch = corpus.num_targets // context
    batches_an_epoch = rows_an_epoch // batch_size

    @lru_cache(maxsize=2)
    def epoch_stream(epoch: int) -> Stream:
        return pack(corpus, shuffled(corpus.num_documents, seed=seed, epoch=epoch))

    def read(rows: NDArray[np.int64]) -> Batch:
        epochs, positions = np.divmod(rows, rows_an_epoch)
        numbers = scatter(positions, rows_an_epoch)
        parts = [
            epoch_stream(int(epoch)).rows(numbers[epochs == epoch], context) for epoch in np.unique(epochs)
        ]
        return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    share = np.arange(batch_size).reshape(world_size, -1)[rank]

    def read_next(first: int) -> Batch:
        epoch, step = divmod(first // batch_size, batches_an_epoch)
        batch = epoch_stream(epoch).rows(share * batches_an_epoch + step, context)
        starts = batch.starts.copy()
        starts[:, 0] |= step == 0
        return batch._replace(starts=starts)

    if consecutive:
        assert cursor.rows % batch_size == 0
        return ((read_next(first), Cursor(first + batch_size)) for first in count(cursor.rows, batch_size))
    return ((read(first + share), Cursor(first + batch_size)) for first in count(cursor.rows, batch_size))


def held_out_batches(corpus: TokenCorpus, *, context: int, batch_size: int, rows: int = 0) -> Iterator[Batch]:
    """Batches for evaluation, in the order of `scatter`; the last batch may have fewer rows.

    `rows` are spread evenly over the corpus. With 0, or more than there are, every target of the corpus comes
    exactly once, the last of them in a shorter row of its own.
    """
    stream = pack(corpus, np.arange(corpus.num_documents))
    num_full, rest = divmod(corpus.num_targets, context)
    is_sample = 0 < rows <= num_full
    numbers = np.arange(rows) * num_full // rows if is_sample else np.arange(num_full)
    numbers = numbers[scatter(np.arange(len(numbers)), len(numbers))]
    for first in range(0, len(numbers), batch_size):
        yield stream.rows(numbers[first : first + batch_size], context)
    if rest and not is_sample:
        yield stream.rows(np.array([num_full]), context)


def _check(corpus: TokenCorpus, context: int, batch_size: int, world_size: int, *, consecutive: bool) -> None:
    """Raise ValueError for too little text, and for a batch that ranks cannot share."""
    if context > corpus.num_targets and not consecutive:
        raise ValueError(
            f"data.context={context} is more than the {corpus.num_targets} tokens of training text: "
            f"set data.context to at most {corpus.num_targets} or add text"
        )
    if batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} does not divide among {world_size} ranks: "
            f"use {batch_size + -batch_size % world_size}"
        )
    if consecutive and batch_size > corpus.num_targets // context:
        raise ValueError(
            f"batch_size={batch_size} rows of {context} tokens are more than the {corpus.num_targets} tokens "
            "of training text: lower train.batch_size, train.tbptt or data.context, or add text"
        )
