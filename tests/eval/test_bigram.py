from collections import Counter
from itertools import pairwise
from math import exp, log

import numpy as np
import pytest

from ssmoe.data.corpus import TokenCorpus
from ssmoe.data.tokenizer import ByteTokenizer, train_bpe
from ssmoe.eval.bigram import byte_bigram, token_bigram

END, VOCABULARY = 6, 8


def corpus_of(documents, end_id=END, num_bytes=100):
    offsets = np.cumsum([0, *(len(document) for document in documents)]).astype(np.int64)
    tokens = np.array([token for document in documents for token in document], "<u2")
    return TokenCorpus(tokens=tokens, offsets=offsets, num_bytes=num_bytes, end_id=end_id)


def stream_of(documents, end):
    return [end, *(token for document in documents for token in [*document, end])]


def slow_bigram(train, end, vocabulary):
    """P(w | v) by dictionaries, for every v and w."""
    stream = stream_of(train, end)
    pairs, unigram = Counter(pairwise(stream)), Counter(stream)
    table = {}
    for v in range(vocabulary):
        after = {w: count for (first, w), count in pairs.items() if first == v}
        for w in range(vocabulary):
            base = (unigram[w] + 1) / (len(stream) + vocabulary)
            n, types = sum(after.values()), len(after)
            table[v, w] = (after.get(w, 0) + types * base) / (n + types) if n else base
    return table


def random_documents(seed, count=9):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 6, size=generator.integers(1, 12)).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_equals_dictionaries(seed):
    train, held_out = random_documents(seed), random_documents(seed + 100, 4)
    table, text = slow_bigram(train, END, VOCABULARY), stream_of(held_out, END)
    nats = -sum(log(table[pair]) for pair in pairwise(text))
    found = token_bigram(corpus_of(train), corpus_of(held_out), VOCABULARY)
    assert found.targets == len(text) - 1
    assert found.loss == pytest.approx(nats / (len(text) - 1), rel=1e-12)
    assert found.bits_per_byte == pytest.approx(nats / log(2) / 100, rel=1e-12)


def test_probabilities_of_every_context_sum_to_one():
    """The document "v w" is the pairs (end, v), (v, w), (w, end); the outer two are divided away."""
    documents = [[0, 1, 2, 0, 1], [3, 3, 0], [5]]
    train, table = corpus_of(documents), slow_bigram(documents, END, VOCABULARY)

    def probability(v, w):
        found = token_bigram(train, corpus_of([[v, w]]), VOCABULARY)
        return exp(-found.loss * found.targets) / table[END, v] / table[w, END]

    for v in range(VOCABULARY):
        assert sum(probability(v, w) for w in range(VOCABULARY)) == pytest.approx(1.0, rel=1e-12)


def test_bytes_do_not_depend_on_the_tokenizer():
    texts = ["the cat sat on the mat", "the dog sat", "é and ÿ"] * 5
    held_out = ["the cat sat", "ÿ"]
    figures = []
    for tokenizer in (ByteTokenizer(), train_bpe(texts, 270)):
        corpora = [
            corpus_of([tokenizer.encode(text) for text in group], tokenizer.end_id, 12 + 2)
            for group in (texts, held_out)
        ]
        figures.append(byte_bigram(*corpora, tokenizer))
    assert figures[0] == figures[1]
    table = slow_bigram([list(text.encode()) for text in texts], 256, 257)
    stream = stream_of([list(text.encode()) for text in held_out], 256)
    bits = -sum(log(table[pair], 2) for pair in pairwise(stream))
    assert figures[0] == pytest.approx(bits / 14, rel=1e-12)
