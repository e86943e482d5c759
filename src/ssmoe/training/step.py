"""One optimiser step: forward and backward over the micro-batches, clip, update."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmoe.config.train import TrainConfig
from ssmoe.data.packing import Batch
from ssmoe.model.feedforwards.router import rebalance
from ssmoe.model.layer import RouterStats
from ssmoe.model.lm import LM
from ssmoe.ops import Segments


class StepResult(NamedTuple):
    """Detached values of one step. lm: nats a target; balance, z: means over the micro-batches.

    routers: for each layer with a router, its statistics, counts added and means averaged over micro-batches.
    """

    lm: Tensor
    balance: Tensor
    z: Tensor
    grad_norm: Tensor
    routers: dict[int, RouterStats]


def train_step(
    model: LM,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    train: TrainConfig,
    rate: float,
    *,
    isolate: bool,
) -> StepResult:
    """Update `model` from one batch at the learning rate `rate`.

    The LM loss is the mean over the whole batch's targets however it is cut; the routers' losses are means
    over the micro-batches, on which they are defined; balancing biases move once, by the load of the whole
    batch. isolate: documents do not see each other.
    """
    device = model.embedding.weight.device
    rows = batch.ids.shape[0]
    size = train.micro_batch_size or rows
    results: list[StepResult] = []
    for begin in range(0, rows, size):
        part = slice(begin, begin + size)
        micro = Batch(batch.ids[part], batch.targets[part], batch.documents[part], batch.starts[part])
        share = micro.ids.shape[0] / rows
        results.append(_accumulate(model, micro, device, share, isolate))
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    routers = {i: _merge([r.routers[i] for r in results]) for i in results[0].routers}
    for i, stats in routers.items():
        rebalance(model.layers[i], stats.load)
    return StepResult(
        lm=torch.stack([r.lm for r in results]).sum(),
        balance=torch.stack([r.balance for r in results]).sum(),
        z=torch.stack([r.z for r in results]).sum(),
        grad_norm=grad_norm,
        routers=routers,
    )


def segments_of(batch: Batch, device: torch.device) -> Segments:
    """The batch's document structure on `device`."""
    return Segments(torch.from_numpy(batch.documents).to(device), torch.from_numpy(batch.starts).to(device))


def _accumulate(model: LM, batch: Batch, device: torch.device, share: float, isolate: bool) -> StepResult:
    """Every target counts, so a micro-batch's share of rows is its share of targets."""
    out = model(
        torch.from_numpy(batch.ids).to(device),
        segments=segments_of(batch, device) if isolate else None,
        targets=torch.from_numpy(batch.targets).to(device),
    )
    (out.loss.total * share).backward()
    return StepResult(
        lm=out.loss.lm.detach() * share,
        balance=out.loss.balance.detach() * share,
        z=out.loss.z.detach() * share,
        grad_norm=out.loss.lm.new_zeros(()),
        routers={
            i: RouterStats(*(t.detach() for t in stats))
            for i, stats in enumerate(out.stats)
            if stats is not None
        },
    )


def _merge(stats: list[RouterStats]) -> RouterStats:
    def mean(name: str) -> Tensor:
        return torch.stack([getattr(s, name) for s in stats]).mean()

    return RouterStats(
        balance=mean("balance"),
        z=mean("z"),
        load=torch.stack([s.load for s in stats]).sum(0),
        dropped=torch.stack([s.dropped for s in stats]).sum(),
        confidence=mean("confidence"),
        entropy=mean("entropy"),
    )
