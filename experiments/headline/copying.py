"""Where a model's held-out loss lies: at targets that repeat something in their row, at others, by position.

A target repeats when it and the two tokens before it already stand, in that order, earlier in the row: then
it can be copied. Attention should gain there, and later in a row more than at its beginning; a model that saw
the tokens it has to predict would gain everywhere.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ssmoe.config.load import RunConfig
from ssmoe.data.loader import held_out_batches
from ssmoe.data.prepare import Prepared
from ssmoe.model.lm import LM
from ssmoe.ops import Segments
from ssmoe.ops.reference.cross_entropy import IGNORE

Parts = dict[str, tuple[float, int]]
"""What part of the targets -> mean loss in nats, and how many there are."""


def repeats(ids: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Which targets (b, l) repeat: bool. The first of a row has but one token before it, so it does not."""
    before = torch.nn.functional.pad(ids, (1, 0))[:, :-1]
    triple = (before * vocab_size + ids) * vocab_size + targets.clamp(min=0)
    triple[:, 0] = -1
    ordered, order = triple.sort(dim=1, stable=True)
    again = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.zeros_like(again).scatter(1, order, again) & (targets != IGNORE)


@torch.no_grad()
def parts(model: LM, data: Prepared, run: RunConfig) -> Parts:
    """The held-out loss of `run`'s rows in parts, in eval mode: four stretches of a row, repeated or not.

    The rows and the forward pass are those of the evaluation; only what counts differs from pass to pass.
    """
    device = model.embedding.weight.device
    context = run.data.context
    stretches = list(pairwise([0, context // 8, context // 4, context // 2, context]))
    names = [f"{first}-{last} {kind}" for first, last in stretches for kind in ("repeated", "new")]
    sums: Parts = dict.fromkeys(names, (0.0, 0))
    training = model.training
    model.eval()
    try:
        for batch in held_out_batches(
            data.held_out,
            context=context,
            batch_size=run.train.micro_batch_size or run.train.batch_size,
            rows=run.train.eval_rows,
        ):
            ids, targets, documents, starts = (torch.from_numpy(array).to(device) for array in batch)
            segments = Segments(documents, starts) if run.data.isolate_documents else None
            repeated = repeats(ids, targets, model.config.vocab_size)
            position = torch.arange(ids.shape[1], device=device)
            for name, (first, last), kind in zip(
                names, (s for s in stretches for _ in range(2)), (repeated, ~repeated) * 4, strict=True
            ):
                here = kind & (position >= first) & (position < last)
                out = model(ids, segments=segments, targets=targets.masked_fill(~here, IGNORE))
                count = int(out.loss.tokens)
                nats, number = sums[name]
                sums[name] = (nats + (float(out.loss.lm) * count if count else 0.0), number + count)
    finally:
        model.train(training)
    return {name: (round(nats / max(number, 1), 4), number) for name, (nats, number) in sums.items()}
