"""Held-out loss, perplexity and bits a byte, always in eval mode: every router dropless."""

from collections.abc import Iterable
from math import exp, log
from typing import NamedTuple

import torch

from ssmoe.data.corpus import TokenCorpus
from ssmoe.data.loader import held_out_batches
from ssmoe.data.packing import Batch
from ssmoe.model.lm import LM
from ssmoe.ops import Segments


class HeldOut(NamedTuple):
    """loss: mean nats a target. bits_per_byte: of the text's UTF-8 bytes, end tokens' cost included.

    targets: how many were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    targets: int


def evaluate(
    model: LM, corpus: TokenCorpus, *, context: int, batch_size: int, rows: int = 0, isolate: bool = True
) -> HeldOut:
    """The model's loss on the first `rows` rows of `corpus` (0 is all); the model's mode is left as it was.

    A row starts from the zero state. isolate: documents in a row do not see each other.
    """
    batches = held_out_batches(corpus, context=context, batch_size=batch_size, rows=rows)
    training = model.training
    model.eval()
    try:
        nats, targets = _sum(model, batches, isolate)
    finally:
        model.train(training)
    return summarise(nats, targets, corpus)


def summarise(nats: float, targets: int, corpus: TokenCorpus) -> HeldOut:
    """Turn the summed loss of `targets` targets of `corpus` into the usual figures."""
    loss = nats / targets
    bits = loss / log(2) * corpus.num_targets / corpus.num_bytes
    return HeldOut(loss, exp(min(loss, 700.0)), bits, targets)


@torch.no_grad()
def _sum(model: LM, batches: Iterable[Batch], isolate: bool) -> tuple[float, int]:
    device = model.embedding.weight.device
    nats, targets = 0.0, 0
    for batch in batches:
        ids, goal, documents, starts = (torch.from_numpy(array).to(device) for array in batch)
        out = model(ids, segments=Segments(documents, starts) if isolate else None, targets=goal)
        nats += float(out.loss.lm) * goal.numel()
        targets += goal.numel()
    return nats, targets
