"""Documents packed end to end into rows of equal length, read at any row without building the stream.

The stream of an epoch is, for each document, the end token and then its tokens; one more end token closes it.
The end token thus opens a document and is also what is to be predicted after a document's last token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssmoe.data.corpus import TokenCorpus


class Batch(NamedTuple):
    """Rows of tokens; every target is valid."""

    ids: NDArray[np.int64]  # (b, l)
    targets: NDArray[np.int64]  # (b, l)
    documents: NDArray[np.int32]  # (b, l)
    """Numbers the documents within a row, from 0."""
    starts: NDArray[np.bool_]  # (b, l)
    """Where a document opens. A row that begins inside a document has no start at 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """The documents of a corpus in some order, with an end token before, between and after them."""

    corpus: TokenCorpus
    begins: NDArray[np.int64]
    """Position of each document's end token, and of the closing one."""
    shifts: NDArray[np.int64]
    """Position in the corpus less position in the stream, a document."""

    def rows(self, numbers: NDArray[np.int64], context: int) -> Batch:
        """Rows by number: row i has the ids at [i * context, (i + 1) * context).

        The stream's last row may be shorter; it must then be asked for alone.
        """
        first = numbers[:, None] * context  # (b, 1)
        length = min(context, self.corpus.num_targets - int(first.max()))
        positions = first + np.arange(length + 1)  # (b, l + 1)
        document = np.searchsorted(self.begins, positions, side="right") - 1
        is_end = positions == self.begins[document]
        tokens = np.full(positions.shape, self.corpus.end_id, np.int64)
        tokens[~is_end] = self.corpus.tokens[(positions + self.shifts[document])[~is_end]]
        return Batch(
            ids=tokens[:, :-1],
            targets=tokens[:, 1:],
            documents=(document - document[:, :1])[:, :-1].astype(np.int32),
            starts=is_end[:, :-1],
        )


def pack(corpus: TokenCorpus, order: NDArray[np.int64]) -> Stream:
    """The stream of the documents in the given order."""
    lengths = np.diff(corpus.offsets)[order] + 1
    begins = np.zeros(len(order) + 1, np.int64)
    np.cumsum(lengths, out=begins[1:])
    shifts = np.zeros_like(begins)
    shifts[:-1] = corpus.offsets[order] - 1 - begins[:-1]
    return Stream(corpus=corpus, begins=begins, shifts=shifts)


def shuffled(num_documents: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the documents in an epoch."""
    # numpy promises that a generator's raw bits never change, but not what its permutation() makes of them
    bits = np.random.Philox(key=(seed % 2**64) | (epoch << 64)).random_raw(num_documents)
    return np.argsort(bits, kind="stable")
