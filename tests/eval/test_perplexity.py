from math import exp, log

import numpy as np
import pytest
import torch

from ssmoe.data.corpus import TokenCorpus
from ssmoe.eval.perplexity import evaluate, summarise
from ssmoe.model.build import build
from tests.model.zoo import mixing, small


def corpus_of(*documents, num_bytes=None):
    offsets = np.cumsum([0, *(len(document) for document in documents)]).astype(np.int64)
    tokens = np.array([token for document in documents for token in document], "<u2")
    return TokenCorpus(tokens=tokens, offsets=offsets, num_bytes=num_bytes or len(tokens), end_id=60)


GENERATOR = np.random.default_rng(0)
CORPUS = corpus_of(*(GENERATOR.integers(0, 60, size=n).tolist() for n in (5, 19, 1, 30, 8)), num_bytes=171)


@torch.no_grad()
def naive(model, corpus, context, isolate):
    """Every target's nats, a row and a document at a time."""
    stream = [60]
    for number in range(corpus.num_documents):
        stream += [*corpus.document(number).tolist(), 60]
    nats = []
    for begin in range(0, len(stream) - 1, context):
        row, goals = stream[begin : begin + context], stream[begin + 1 : begin + context + 1]
        row = row[: len(goals)]
        cuts = [i for i in range(1, len(row)) if row[i] == 60 and isolate]
        for start, stop in zip([0, *cuts], [*cuts, len(row)], strict=True):
            logits = model(torch.tensor([row[start:stop]])).logits[0].log_softmax(-1)
            nats += [-float(logits[i, goals[start + i]]) for i in range(stop - start)]
    return nats


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(("context", "batch_size"), [(7, 2), (7, 100), (16, 3), (68, 1), (200, 4)])
def test_all_rows_equal_a_naive_sum(context, batch_size, isolate):
    model = build(small("hybrid", repeat=1)).double().eval()
    nats = naive(model, CORPUS, context, isolate)
    found = evaluate(model, CORPUS, context=context, batch_size=batch_size, isolate=isolate)
    assert found.targets == len(nats) == CORPUS.num_targets == 68
    assert found.loss == pytest.approx(sum(nats) / 68, rel=1e-12)
    assert found.perplexity == pytest.approx(exp(found.loss))
    assert found.bits_per_byte == pytest.approx(sum(nats) / log(2) / 171)


def test_isolation_makes_a_difference():
    model = build(small("mamba", repeat=1)).double()
    losses = [evaluate(model, CORPUS, context=16, batch_size=2, isolate=i).loss for i in (True, False)]
    assert losses[0] != losses[1]


def test_a_sample_of_rows_counts_only_those():
    model = build(small("dense", repeat=1)).double().eval()
    found = evaluate(model, CORPUS, context=7, batch_size=2, rows=3)
    assert found.targets == 21
    nats = naive(model, CORPUS, 7, True)
    rows = [sum(nats[7 * i : 7 * i + 7]) for i in (0, 3, 6)]
    assert found.loss == pytest.approx(sum(rows) / 21)


def test_evaluation_is_dropless_and_leaves_the_mode():
    model = build(small("moe-mamba", repeat=1)).double()
    expected = evaluate(model.eval(), CORPUS, context=16, batch_size=4)
    assert not model.training
    assert evaluate(model.train(), CORPUS, context=16, batch_size=4) == expected
    assert model.training
    assert evaluate(model, CORPUS, context=16, batch_size=1).loss == pytest.approx(expected.loss, rel=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_the_mode_is_put_back_after_a_failure():
    model = build(small("dense", repeat=1, vocab_size=30)).train()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        evaluate(model, CORPUS, context=16, batch_size=4)
    assert model.training


def test_bits_a_byte_spread_over_the_whole_text():
    corpus = corpus_of([1, 2, 3], [4], num_bytes=12)
    found = summarise(nats=8 * log(2), targets=4, corpus=corpus)
    # two bits a target, six targets (two ends), twelve bytes
    assert found.bits_per_byte == pytest.approx(1.0)
    assert found.perplexity == pytest.approx(4.0)
    assert summarise(1e6, 1, corpus).perplexity < float("inf")


@pytest.mark.parametrize(
    ("name", "context", "batch_size", "group"),
    [("mot", 7, 1, "2 rows by 1 tokens"), ("mot-masked", 7, 4, "1 rows by 4 tokens")],
)
def test_text_that_fills_no_group_says_which(name, context, batch_size, group):
    model = build(mixing(name))
    with pytest.raises(ValueError, match=f"fills no group of {group}"):
        evaluate(model, CORPUS, context=context, batch_size=batch_size)


def test_rows_that_fill_no_group_are_left_out():
    found = evaluate(build(mixing("mot")), CORPUS, context=7, batch_size=3)
    # of 9 whole rows in batches of three, two of each; the last row has five tokens and is alone
    assert found.targets == 3 * 2 * 7
