"""One optimiser step: forward and backward over the micro-batches, clip, update."""

from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from ssmoe.config.train import TrainConfig
from ssmoe.data.packing import Batch
from ssmoe.model.feedforwards.router import rebalance
from ssmoe.model.layer import RouterStats, State
from ssmoe.model.lm import LM, ModelOut
from ssmoe.model.state import concatenate, detach, select
from ssmoe.ops import Segments
from ssmoe.training.optimizer import clip, narrow_gradients, set_learning_rate


class StepResult(NamedTuple):
    """Detached values of one step. lm: nats a target; balance, z: means over the micro-batches.

    routers: for each layer with a router, its statistics, counts added and means averaged over micro-batches.
    state: with train.tbptt, where the rows ended, else None.
    """

    lm: Tensor
    balance: Tensor
    z: Tensor
    grad_norm: Tensor
    routers: dict[int, RouterStats]
    state: State | None


class Inputs(NamedTuple):
    """A batch on the device. ids, targets: (b, l) int64. segments: where documents are kept apart."""

    ids: Tensor
    targets: Tensor
    segments: Segments | None

    def rows(self, begin: int, end: int) -> "Inputs":
        """The rows begin to end."""
        apart = self.segments
        part = None if apart is None else Segments(apart.ids[begin:end], apart.starts[begin:end])
        return Inputs(self.ids[begin:end], self.targets[begin:end], part)


def train_step(
    model: LM,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    train: TrainConfig,
    rate: float,
    *,
    isolate: bool,
    state: State | None = None,
) -> StepResult:
    """Update `model` from one batch at the learning rate `rate`.

    The LM loss is the mean over the whole batch's targets however it is cut; the routers' losses are means
    over the micro-batches, on which they are defined; balancing biases move once, by the load of the whole
    batch. isolate: documents do not see each other. With train.tbptt the rows are that many windows, read one
    after another from `state` on.
    """
    set_learning_rate(optimizer, rate)
    inputs = inputs_of(batch, model.embedding.weight.device, isolate=isolate)
    return update(model, optimizer, inputs, train, state=state)


def inputs_of(batch: Batch, device: torch.device, *, isolate: bool) -> Inputs:
    """The batch on `device`, with its document structure if `isolate`."""
    segments = segments_of(batch, device) if isolate else None
    return Inputs(_to(batch.ids, device), _to(batch.targets, device), segments)


def update(
    model: LM,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    train: TrainConfig,
    *,
    state: State | None = None,
) -> StepResult:
    """`train_step` where the batch and the learning rate have reached the device."""
    with narrow_gradients(optimizer):
        results = accumulate(model, inputs, train, state)
        grad_norm = clip(model.parameters(), optimizer, train.clip_norm)
        # on a CPU looking costs nothing, and weights that are still numbers can be asked what went wrong
        if grad_norm.device.type != "cpu" or bool(grad_norm.isfinite()):
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
        state=None if train.tbptt is None else concatenate([r.state for r in results if r.state is not None]),
    )


def accumulate(model: LM, inputs: Inputs, train: TrainConfig, state: State | None) -> list[StepResult]:
    """Forward and backward over every micro-batch: the gradients of a step, and what each part gave."""
    rows = inputs.ids.shape[0]
    size = train.micro_batch_size or rows
    results: list[StepResult] = []
    for begin in range(0, rows, size):
        micro = inputs.rows(begin, min(begin + size, rows))
        share = micro.ids.shape[0] / rows
        past = None if state is None else select(state, list(range(begin, begin + micro.ids.shape[0])))
        results.append(_accumulate(model, micro, share, past, train.tbptt))
    return results


def segments_of(batch: Batch, device: torch.device) -> Segments:
    """The batch's document structure on `device`."""
    return Segments(_to(batch.documents, device), _to(batch.starts, device))


def _to(array: NDArray[Any], device: torch.device) -> Tensor:
    """On `device`; the copy to a GPU does not wait for what the GPU is doing."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _accumulate(
    model: LM, inputs: Inputs, share: float, state: State | None, tbptt: int | None
) -> StepResult:
    """Every target counts, so a micro-batch's share of rows is its share of targets."""
    ids, targets, segments = inputs
    outs: list[ModelOut] = []
    size = ids.shape[1] // (tbptt or 1)
    for begin in range(0, ids.shape[1], size):
        end = begin + size
        piece = None if segments is None else segments.slice(begin, end)
        out: ModelOut = model(ids[:, begin:end], state, piece, targets=targets[:, begin:end])
        outs.append(out)
        state = out.state if tbptt else None
    share /= len(outs)
    losses = [out.loss for out in outs if out.loss is not None]
    torch.stack([loss.total * share for loss in losses]).sum().backward()
    return StepResult(
        lm=torch.stack([loss.lm.detach() * share for loss in losses]).sum(),
        balance=torch.stack([loss.balance.detach() * share for loss in losses]).sum(),
        z=torch.stack([loss.z.detach() * share for loss in losses]).sum(),
        grad_norm=losses[0].lm.new_zeros(()),
        routers={i: _merge(found) for i, found in _routers(outs).items()},
        state=None if state is None else detach(state),
    )


def _routers(outs: list[ModelOut]) -> dict[int, list[RouterStats]]:
    found: dict[int, list[RouterStats]] = {}
    for out in outs:
        for i, stats in enumerate(out.stats):
            if stats is not None:
                found.setdefault(i, []).append(RouterStats(*(t.detach() for t in stats)))
    return found


def _merge(stats: list[RouterStats]) -> RouterStats:
    if len(stats) == 1:
        return stats[0]

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
