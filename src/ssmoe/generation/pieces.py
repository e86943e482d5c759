"""Reading prompts on a GPU: pieces of one shape through one CUDA graph, the state in place.

A GPU reads a piece of a few rows sooner than the host has launched its kernels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssmoe.model.feedforwards.dense import Dense
from ssmoe.model.feedforwards.moe import MoE
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.model.state import clone
from ssmoe.ops import Segments

CAPTURED = (Mamba, Dense, MoE)
"""Layers whose state keeps its size."""
MOST = 8192
"""Tokens; a GPU takes longer over more than the host does, and a graph keeps the memory of its piece."""
Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]


class Pieces:
    """`model` over a piece of prompts: (ids, state, segments) -> (logits (b, vocab), state).

    The graph that was used last is kept. A piece of at most MOST tokens without padding that goes on from a
    state is recorded when its shape comes a second time in turn, and replayed from then on; every other piece
    is read as it stands. The state that a graph returns is overwritten by its next piece: `copied` makes it
    lasting.
    """

    def __init__(self, model: LM, capture: Capture) -> None:
        self._model, self._capture = model, capture
        layers: list[nn.Module] = [layer.get_submodule("layer") for layer in model.layers]
        self._fits = all(isinstance(layer, CAPTURED) for layer in layers)
        self._last: tuple[object, ...] | None = None
        self._graph: _Graph | None = None

    def __call__(self, ids: Tensor, state: State | None, segments: Segments | None) -> tuple[Tensor, State]:
        """ids: (b, l). state None is `init_state`."""
        if self._fits and state is not None and segments is None and ids.shape[1] > 1 and ids.numel() <= MOST:
            key = (ids.shape, torch.is_inference_mode_enabled())
            if self._graph is not None and self._graph.key == key:
                return self._graph.read(ids, state)
            if self._last == key:
                # the old one's memory first
                self._graph = None
                self._graph = _Graph(self._model, key, self._capture)
                return self._graph.read(ids, state)
            self._last = key
        out = self._model(ids, state, segments, logits="last")
        return out.logits, out.state

    def copied(self, state: State) -> State:
        """`state`, no longer in the memory of a graph."""
        if self._graph is None or state is not self._graph.state:
            return state
        return clone(state)


class _Graph:
    """One piece for rows of one length: reads `ids` and moves `state` on."""

    def __init__(self, model: LM, key: tuple[object, ...], capture: Capture) -> None:
        shape = key[0]
        assert isinstance(shape, torch.Size)
        device = model.embedding.weight.device
        self.key, self._model, self._device = key, model, device
        self.state = model.init_state(shape[0])
        self._ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        self._replay = capture(self._work, device)

    def _work(self) -> None:
        out = self._model(self._ids, self.state, logits="last")
        self._take(out.state)
        self._logits = out.logits

    def _take(self, state: State) -> None:
        for mine, layer in zip(self.state, state, strict=True):
            for place, leaf in zip(mine, layer, strict=True):
                place.copy_(leaf)

    def read(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        self._ids.copy_(ids)
        if state is not self.state:
            self._take(state)
        if ids.is_cuda:
            # a graph does not wait for the stream of its caller
            torch.cuda.current_stream(self._device).synchronize()
        self._replay()
        assert self._logits is not None
        return self._logits.clone(), self.state
