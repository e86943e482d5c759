"""A training step as one CUDA graph: a GPU is done with a kernel sooner than the host has asked for the next.

The first steps run as always, since they compile kernels and make the optimiser's state. Then the launches of
one step are recorded, from the inputs to the new weights, and from then on only replayed: the same kernels on
the same memory in the same order. Inputs and the learning rate are copied into place before; the numbers of a
step lie where the next one writes its own, so they are to be read before that (`arrival` does).
"""

import torch
from torch.autograd.graph import increment_version

from ssmoe.config.train import TrainConfig
from ssmoe.data.packing import Batch
from ssmoe.model.feedforwards.dense import Dense
from ssmoe.model.feedforwards.expert_choice import ExpertChoice
from ssmoe.model.feedforwards.moe import MoE
from ssmoe.model.feedforwards.mot import MixtureOfTokens
from ssmoe.model.feedforwards.router import Router
from ssmoe.model.lm import LM
from ssmoe.model.mixers.attention import Attention
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.training.optimizer import set_learning_rate
from ssmoe.training.step import Inputs, StepResult, inputs_of, update

CAPTURED = (Mamba, Attention, Dense, MoE, ExpertChoice, MixtureOfTokens)
"""Layers whose training neither waits for the host nor takes shapes from values, but see `why_not`."""
BEFORE = 2
"""Steps that are launched kernel by kernel before one is recorded."""


def why_not(model: LM, train: TrainConfig, *, isolate: bool) -> str | None:
    """Why training steps of `model` cannot be captured, in one line; None when they can."""
    device = model.embedding.weight.device
    if device.type != "cuda":
        return f"the model is on {device.type}, and graphs need a CUDA device"
    if model.backend != "triton":
        return f"the backend is {model.backend!r}, and graphs need 'triton'"
    if train.tbptt is not None:
        return "train.tbptt carries a state from step to step"
    if train.recompute and any(m.jitter > 0 for m in model.modules() if isinstance(m, Router)):
        return "train.recompute would have to draw the router's random numbers again"
    for i, residual in enumerate(model.layers):
        layer = residual.get_submodule("layer")
        if not isinstance(layer, CAPTURED):
            return f"layer {i} is {type(layer).__name__}, which waits for the host"
        if isolate and isinstance(layer, Attention):
            return f"layer {i} is Attention, which waits for the host where documents are kept apart"
        if isolate and isinstance(layer, Mamba) and layer.ssm.initial_state is not None:
            return f"layer {i} begins documents inside a row from a learned state, which waits for the host"
    return None


class CapturedStep:
    """`train_step` for batches of one shape; the same arguments, and the same values to the bit.

    What is returned is overwritten by the next call. A batch of another shape runs as an ordinary step.
    """

    def __init__(
        self, model: LM, optimizer: torch.optim.Optimizer, train: TrainConfig, *, isolate: bool
    ) -> None:
        self._model, self._optimizer, self._train, self._isolate = model, optimizer, train, isolate
        self._device = model.embedding.weight.device
        self._stream = torch.cuda.Stream(self._device)
        self._taken = 0
        self._inputs: Inputs | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: StepResult | None = None

    def __call__(self, batch: Batch, rate: float) -> StepResult:
        """One step of `batch` at the learning rate `rate`."""
        set_learning_rate(self._optimizer, rate)
        inputs = inputs_of(batch, self._device, isolate=self._isolate)
        self._taken += 1
        if self._taken <= BEFORE:
            return self._aside(inputs)
        if self._inputs is None:
            self._inputs = inputs
            self._capture()
        elif not _fill(self._inputs, inputs):
            return self._aside(inputs)
        assert self._graph is not None
        assert self._result is not None
        self._graph.replay()
        # whoever keeps something made from the weights sees that they are others
        increment_version(list(self._model.parameters()))
        return self._result

    def _aside(self, inputs: Inputs) -> StepResult:
        """On the stream that is recorded, so that what is made here belongs to it."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = update(self._model, self._optimizer, inputs, self._train)
        here.wait_stream(self._stream)
        return result

    def _capture(self) -> None:
        assert self._inputs is not None
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph, stream=self._stream):
            self._result = update(self._model, self._optimizer, self._inputs, self._train)


def _fill(into: Inputs, inputs: Inputs) -> bool:
    """Copy the tensors of `inputs` over those of `into`; False, and nothing copied, for other shapes."""
    pairs = [(into.ids, inputs.ids), (into.targets, inputs.targets)]
    if into.segments is not None and inputs.segments is not None:
        pairs += list(zip(into.segments, inputs.segments, strict=True))
    if any(old.shape != new.shape for old, new in pairs):
        return False
    for old, new in pairs:
        old.copy_(new)
    return True
