"""States as values: pick, repeat, join, save and load the rows of a model's recurrent state.

Every leaf of a state has the batch first; nothing here changes a state in place.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.model.layer import LayerState, State
from ssmoe.model.mixers.attention import AttentionState, copy_with_room
from ssmoe.model.state_file import StateFile, StateHeader, fingerprint, load, read, save

__all__ = [
    "StateFile",
    "StateHeader",
    "alone",
    "clone",
    "concatenate",
    "detach",
    "expand",
    "fingerprint",
    "load",
    "num_bytes",
    "read",
    "save",
    "select",
    "with_room",
]


def select(state: State, index: Tensor | Sequence[int]) -> State:
    """The rows `index` (int64 or bool) of `state`, in that order, copied."""
    rows = torch.as_tensor(index)
    return _map(lambda leaf: leaf[rows.to(leaf.device)], state)


def alone(state: State, row: int) -> State:
    """One row, copied; its attention layers without the room that it does not use."""
    layers: list[LayerState] = []
    for layer in state:
        if isinstance(layer, AttentionState):
            used = int(layer.length[row])
            layer = AttentionState(layer.keys[:, :, :used], layer.values[:, :, :used], layer.length)
        layers.append(_rebuild(layer, [leaf[row : row + 1].clone() for leaf in layer]))
    return tuple(layers)


def expand(state: State, n: int) -> State:
    """Each row n times in a row, for n continuations of the same past."""
    if n < 1:
        raise ValueError(f"expand needs n >= 1, got {n}")
    return _map(lambda leaf: leaf.repeat_interleave(n, dim=0), state)


def concatenate(states: Sequence[State]) -> State:
    """The rows of all states one after another; attention layers take the largest capacity.

    Raises ValueError for no states or for states of different models.
    """
    if not states:
        raise ValueError("concatenate needs at least one state")
    if len({len(state) for state in states}) > 1:
        raise ValueError(f"states of different models: they have {[len(s) for s in states]} layers")
    return tuple(_concatenate_layer(layers) for layers in zip(*states, strict=True))


def with_room(state: State, room: int) -> State:
    """A copy whose attention layers have room for `room` tokens, or as many as they hold."""
    return tuple(
        copy_with_room(layer, room)
        if isinstance(layer, AttentionState)
        else _rebuild(layer, [leaf.clone() for leaf in layer])
        for layer in state
    )


def clone(state: State) -> State:
    """The same values in memory of their own."""
    return _map(lambda leaf: leaf.clone(), state)


def detach(state: State) -> State:
    """The same values, cut from the graph that computed them."""
    return _map(lambda leaf: leaf.detach(), state)


def num_bytes(state: State) -> int:
    """Memory that the state takes."""
    return sum(leaf.numel() * leaf.element_size() for layer in state for leaf in layer)


def _concatenate_layer(layers: Sequence[LayerState]) -> LayerState:
    if len({type(layer) for layer in layers}) > 1:
        raise ValueError("states of different models: a layer's kinds differ")
    if isinstance(layers[0], AttentionState):
        room = max(layer[0].shape[2] for layer in layers)
        layers = [
            AttentionState(_pad(keys, room), _pad(values, room), length) for keys, values, length in layers
        ]
    leaves = [torch.cat(parts) for parts in zip(*layers, strict=True)]
    return _rebuild(layers[0], leaves)


def _pad(tokens: Tensor, room: int) -> Tensor:
    return F.pad(tokens, (0, 0, 0, room - tokens.shape[2]))


def _map(fn: Callable[[Tensor], Tensor], state: State) -> State:
    return tuple(_rebuild(layer, [fn(leaf) for leaf in layer]) for layer in state)


def _rebuild(layer: LayerState, leaves: list[Tensor]) -> LayerState:
    return type(layer)(*leaves) if leaves else ()
