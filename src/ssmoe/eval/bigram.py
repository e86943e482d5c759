"""A bigram count model, the baseline that a language model must beat.

Interpolated Witten-Bell smoothing, which has no parameter to tune:
P(w | v) = (count(v, w) + types(v) P(w)) / (count(v) + types(v)), P(w) = (count(w) + 1) / (n + vocabulary)
"""

from collections.abc import Iterator
from math import log

import numpy as np
from numpy.typing import NDArray

from ssmoe.data.corpus import TokenCorpus
from ssmoe.data.tokenizer import Tokenizer
from ssmoe.eval.perplexity import HeldOut, summarise


def token_bigram(train: TokenCorpus, held_out: TokenCorpus, vocab_size: int) -> HeldOut:
    """Fit on all of `train`'s tokens and score all of `held_out`'s, end tokens included."""
    nats, targets = _score(_token_streams(train), _token_streams(held_out), vocab_size)
    return summarise(nats, targets, held_out)


def byte_bigram(train: TokenCorpus, held_out: TokenCorpus, tokenizer: Tokenizer) -> float:
    """Bits a byte of the same model over the text's bytes, 256 ending a document."""
    nats, _ = _score(_byte_streams(train, tokenizer), _byte_streams(held_out, tokenizer), 257)
    return nats / log(2) / held_out.num_bytes


def _score(
    train: Iterator[NDArray[np.int64]], held_out: Iterator[NDArray[np.int64]], vocabulary: int
) -> tuple[float, int]:
    stream = np.concatenate(list(train))
    pairs, counts = np.unique(stream[:-1] * vocabulary + stream[1:], return_counts=True)
    firsts = pairs // vocabulary
    followed = np.bincount(firsts, weights=counts, minlength=vocabulary)
    types = np.bincount(firsts, minlength=vocabulary)
    unigram = (np.bincount(stream, minlength=vocabulary) + 1) / (len(stream) + vocabulary)

    text = np.concatenate(list(held_out))
    before, after = text[:-1], text[1:]
    key = before * vocabulary + after
    place = np.minimum(np.searchsorted(pairs, key), len(pairs) - 1)
    seen = np.where(pairs[place] == key, counts[place], 0)
    weight = types[before]
    smoothed = (seen + weight * unigram[after]) / np.maximum(followed[before] + weight, 1)
    probability = np.where(weight == 0, unigram[after], smoothed)
    return float(-np.log(probability).sum()), len(after)


def _token_streams(corpus: TokenCorpus) -> Iterator[NDArray[np.int64]]:
    """Each document after its end token, and the closing end."""
    end = np.array([corpus.end_id], dtype=np.int64)
    for number in range(corpus.num_documents):
        yield end
        yield corpus.document(number).astype(np.int64)
    yield end


def _byte_streams(corpus: TokenCorpus, tokenizer: Tokenizer) -> Iterator[NDArray[np.int64]]:
    end = np.array([256], dtype=np.int64)
    for number in range(corpus.num_documents):
        yield end
        text = tokenizer.decode(corpus.document(number).tolist())
        yield np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    yield end
