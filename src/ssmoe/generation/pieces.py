"""Reading prompts on a GPU: pieces of one shape through one CUDA graph, the state in place.

A GPU reads a piece of a few rows sooner than the host has launched its kernels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmoe.model.feedforwards.dense import Dense
from ssmoe.model.feedforwards.moe import MoE
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.model.mixers.attention import Attention
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.ops import Segments

CAPTURED = (Mamba, Attention, Dense, MoE)
"""Layers that read a piece without waiting for the host; beside attention only a row's first piece."""
MOST = 16384
"""Tokens; a GPU takes longer over more than the host does, and graphs keep the memory of the largest."""
ROUNDED = 8192
"""Tokens up to which a piece is padded to a rounded length, so that prompts of like lengths share a graph."""
KEPT = 16
"""Graphs, and shapes that are remembered without one."""
Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]


class Shape(NamedTuple):
    """What a graph is for. begins: from the initial state. padded: behind the rows' ends, by segments."""

    rows: int
    length: int
    begins: bool
    padded: bool
    inference: bool


class Pieces:
    """`model` over a piece of prompts: (ids, state, segments) -> (logits (b, vocab), state).

    A piece of at most MOST tokens is recorded when its shape comes a second time and replayed from then on.
    The KEPT graphs that were used last are kept, and share their memory if `capture` lets them. Short pieces
    are padded to a rounded length. Every other piece is read as it stands. The state that a graph returns is
    overwritten by the next graph of as many rows: `copied` makes it lasting.
    """

    def __init__(self, model: LM, capture: Capture) -> None:
        self._model, self._capture = model, capture
        layers: list[nn.Module] = [layer.get_submodule("layer") for layer in model.layers]
        self._fits = all(isinstance(layer, CAPTURED) for layer in layers)
        self._grows = any(isinstance(layer, Attention) for layer in layers)
        # attention over padding, and documents that begin from a learned state, ask the host
        self._pads = not self._grows and not any(
            isinstance(layer, Mamba) and layer.ssm.initial_state is not None for layer in layers
        )
        self._seen: dict[Shape, None] = {}
        self._graphs: dict[Shape, _Graph] = {}

    def __call__(self, ids: Tensor, state: State | None, segments: Segments | None) -> tuple[Tensor, State]:
        """ids: (b, l). state None is `init_state`."""
        shape = self._shape(ids, state, segments)
        if shape is not None and (graph := self._graph(shape)) is not None:
            return graph.read(ids, state, segments)
        out = self._model(ids, state, segments, logits="last")
        assert out.logits is not None
        return out.logits, out.state

    def copied(self, state: State) -> State:
        """`state`, no longer in the memory of a graph."""
        return _clone(state) if any(state is graph.state for graph in self._graphs.values()) else state

    def _shape(self, ids: Tensor, state: State | None, segments: Segments | None) -> Shape | None:
        """The graph that would read the piece; None where none may."""
        rows, length = ids.shape
        if not self._fits or length == 1 or (segments is not None and not self._pads):
            return None
        if self._grows and state is not None:
            return None
        padded = segments is not None
        if self._pads and rows * rounded(length) <= ROUNDED:
            padded, length = padded or length != rounded(length), rounded(length)
        if rows * length > MOST:
            return None
        return Shape(rows, length, state is None, padded, torch.is_inference_mode_enabled())

    def _graph(self, shape: Shape) -> "_Graph | None":
        """The graph of `shape`, recorded where it comes a second time; None the first time."""
        found = self._graphs.pop(shape, None)
        if found is None and shape not in self._seen:
            self._seen[shape] = None
            if len(self._seen) > KEPT:
                del self._seen[next(iter(self._seen))]
            return None
        if found is None:
            del self._seen[shape]
            self._make_room(shape)
            alike = [graph.state for other, graph in self._graphs.items() if other.rows == shape.rows]
            shared = alike[0] if alike and not self._grows else None
            found = _Graph(self._model, shape, shared, self._capture)
        # the one that was used last stands at the end
        self._graphs[shape] = found
        return found

    def _make_room(self, shape: Shape) -> None:
        """Of states that grow with the piece, all graphs together hold no more than the largest may."""
        while self._graphs:
            held = sum(other.rows * other.length for other in (*self._graphs, shape))
            if len(self._graphs) < KEPT and not (self._grows and held > MOST):
                return
            del self._graphs[next(iter(self._graphs))]


def rounded(length: int) -> int:
    """At least `length`, in quarters of a power of two and at least 64: an eighth is wasted on average."""
    step = max(64, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


class _Graph:
    """One piece of one shape: reads `ids` and moves `state` on, which graphs of as many rows may share."""

    def __init__(self, model: LM, shape: Shape, state: State | None, capture: Capture) -> None:
        size, device = (shape.rows, shape.length), model.embedding.weight.device
        self._shape, self._model = shape, model
        self._ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._segments: Segments | None = None
        if shape.padded:
            kinds = (torch.zeros(size, dtype=dtype, device=device) for dtype in (torch.int32, torch.bool))
            self._segments = Segments(*kinds)
        # what another graph has left there must outlive the recording
        kept = None if state is None else _clone(state)
        self.state = model.init_state(shape.rows, shape.length) if state is None else state
        self._logits: Tensor | None = None
        self._replay = capture(self._work, device)
        if kept is not None:
            _copy(kept, self.state)

    def _work(self) -> None:
        begin = None if self._shape.begins else self.state
        out = self._model(self._ids, begin, self._segments, logits="last")
        _copy(out.state, self.state)
        self._logits = out.logits

    def read(self, ids: Tensor, state: State | None, segments: Segments | None) -> tuple[Tensor, State]:
        """As `Pieces`; the state is `self.state`."""
        length = ids.shape[1]
        self._ids[:, :length].copy_(ids)
        if self._segments is not None:
            self._segments.ids[:, length:].fill_(-1)
            if segments is None:
                self._segments.ids[:, :length].zero_()
                self._segments.starts.zero_()
            else:
                self._segments.ids[:, :length].copy_(segments.ids)
                self._segments.starts[:, :length].copy_(segments.starts)
        if state is not None and state is not self.state:
            _copy(state, self.state)
        self._replay()
        assert self._logits is not None
        return self._logits.clone(), self.state


def _copy(state: State, to: State) -> None:
    """All layers in a launch or two, since the host takes longer over a launch a layer."""
    given = [leaf for layer in state for leaf in layer]
    places = [leaf for layer in to for leaf in layer]
    for dtype in {leaf.dtype for leaf in places}:
        at = [i for i, leaf in enumerate(places) if leaf.dtype == dtype]
        torch._foreach_copy_([places[i] for i in at], [given[i] for i in at])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def _clone(state: State) -> State:
    fresh = tuple(type(layer)(*map(torch.empty_like, layer)) if layer else layer for layer in state)
    _copy(state, fresh)
    return fresh
