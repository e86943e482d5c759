"""Corpora for the tests of this folder."""

from collections.abc import Callable

import numpy as np
import pytest

from ssmoe.data.corpus import TokenCorpus


@pytest.fixture
def corpus_of() -> Callable[[list[list[int]]], TokenCorpus]:
    """A corpus in memory, from the tokens of its documents; 999 is the end token."""

    def build(documents: list[list[int]]) -> TokenCorpus:
        offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents], dtype=np.int64)])
        tokens = np.array([token for document in documents for token in document], "<u2")
        return TokenCorpus(tokens=tokens, offsets=offsets.astype(np.int64), num_bytes=len(tokens), end_id=999)

    return build


@pytest.fixture
def random_corpus(corpus_of) -> Callable[[np.random.Generator], TokenCorpus]:
    """Up to 30 documents of 0 to 20 tokens."""

    def build(generator: np.random.Generator) -> TokenCorpus:
        lengths = generator.integers(0, 21, size=generator.integers(1, 31))
        return corpus_of([generator.integers(0, 999, size=length).tolist() for length in lengths])

    return build
