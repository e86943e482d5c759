"""Held-out loss, perplexity and bits a byte, always in eval mode: every router dropless."""

from collections.abc import Iterable, Iterator
from math import exp, log
from typing import NamedTuple

import torch

from ssmoe.config.model import ModelConfig
from ssmoe.data.corpus import TokenCorpus
from ssmoe.data.loader import held_out_batches
from ssmoe.data.masking import hide
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
    model: LM,
    corpus: TokenCorpus,
    *,
    context: int,
    batch_size: int,
    rows: int = 0,
    isolate: bool = True,
    mask_fraction: float = 0.15,
) -> HeldOut:
    """The model's loss on `rows` rows spread over `corpus` (0 is all); the model's mode is left as it was.

    A row starts from the initial state. isolate: documents in a row do not see each other. Rows that do not
    fill a group of a Mixture of Tokens are left out. mask_fraction: of a masked model; the same tokens are
    hidden each time. Raises ValueError where no row is left.
    """
    batches = held_out_batches(corpus, context=context, batch_size=batch_size, rows=rows)
    training = model.training
    model.eval()
    try:
        nats, targets = _sum(model, _fitting(batches, model.config, mask_fraction), isolate)
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
        counted = int(out.loss.tokens)
        nats += float(out.loss.lm) * counted
        targets += counted
    if targets == 0:
        rows, tokens = model.config.row_multiple, model.config.length_multiple
        raise ValueError(
            f"the held-out text fills no group of {rows} rows by {tokens} tokens: raise train.eval_rows and "
            "the batch size to a multiple of the first, data.context to one of the second, or data.held_out"
        )
    return nats, targets


def _fitting(batches: Iterable[Batch], config: ModelConfig, mask_fraction: float) -> Iterator[Batch]:
    """The rows that fill whole groups, with tokens hidden for a masked model."""
    for number, batch in enumerate(batches):
        rows, length = batch.ids.shape
        rows -= rows % config.row_multiple
        if rows == 0 or length % config.length_multiple:
            continue
        batch = Batch(batch.ids[:rows], batch.targets[:rows], batch.documents[:rows], batch.starts[:rows])
        if config.objective == "masked":
            mask_id = config.vocab_size - 1
            batch = hide(batch, mask_id=mask_id, fraction=mask_fraction, seed=0, number=number)
        yield batch
