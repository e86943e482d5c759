"""A text's state with its accumulated decay, which is what states need to be mixed in sequence.

h(s1 s2) = P(s2) h(s1) + h(s2) with P(s) = exp(A sum_{t in s} delta'_t), element by element: exact for a layer
whose inputs are given, so for a model's first layer, and an approximation above it (State Soup, arXiv
2406.08423).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.model.mixers.mamba import Mamba, MambaState
from ssmoe.model.state import select
from ssmoe.ops import Segments


class Memory(NamedTuple):
    """What a text leaves behind, one row a text; to be mixed, each is read from the model's initial state.

    steps: for each layer with a scan the sum of delta' (b, d_inner), else None. tokens: how many were read.
    """

    state: State
    steps: tuple[Tensor | None, ...]
    tokens: int


@torch.no_grad()
def capture(model: LM, ids: Tensor, state: State | None = None) -> Memory:
    """Read `ids` (b, l) after `state`; the steps are those of `ids` alone.

    Raises ValueError for a model with layers whose state is no sum, such as attention.
    """
    # one document that goes on: with segments given, a single token is not taken in one fused op
    whole = Segments.ragged([ids.shape[1]] * ids.shape[0], device=ids.device)
    return Memory(*_read(model, ids, state, whole), ids.shape[1])


@torch.no_grad()
def capture_each(model: LM, texts: Sequence[Sequence[int]]) -> list[Memory]:
    """A memory of one row for each text, of any lengths, read together from the initial state.

    Raises ValueError as `capture`, and for no texts or one without tokens.
    """
    if not all(texts) or not texts:
        raise ValueError("a text has no tokens, or there is none: give each at least one")
    device = model.embedding.weight.device
    lengths = [len(text) for text in texts]
    ids = torch.tensor([[*text, *[0] * (max(lengths) - len(text))] for text in texts], device=device)
    state, steps = _read(model, ids, None, Segments.ragged(lengths, device=device))
    return [
        Memory(
            select(state, [row]),
            tuple(None if taken is None else taken[row : row + 1] for taken in steps),
            lengths[row],
        )
        for row in range(len(texts))
    ]


def scans(model: LM) -> dict[int, Mamba]:
    """The layers with a scan, by number. Raises ValueError where another layer keeps a state."""
    layers = [layer.get_submodule("layer") for layer in model.layers]
    for i, (layer, state) in enumerate(zip(layers, model.init_state(1), strict=True)):
        if state and not isinstance(layer, Mamba):
            raise ValueError(
                f"layer {i} ({type(layer).__name__}) has a state that cannot be mixed: use a model whose "
                "only mixers are Mamba"
            )
    return {i: layer for i, layer in enumerate(layers) if isinstance(layer, Mamba)}


def transitions(model: LM) -> tuple[Tensor | None, ...]:
    """A (d_inner, d_state) of each layer with a scan, else None."""
    mixers = scans(model)
    return tuple(mixers[i].ssm()[0].detach() if i in mixers else None for i in range(len(model.layers)))


def beginnings(model: LM) -> tuple[Tensor | None, ...]:
    """What each layer's texts begin from (d_inner, d_state), None where that is zero or there is no scan."""
    mixers = scans(model)
    learned = [mixers[i].ssm.initial_state if i in mixers else None for i in range(len(model.layers))]
    return tuple(None if state is None else state.detach() for state in learned)


def scan_state(memory: Memory, layer: int) -> MambaState:
    """The state of a layer with a scan. Raises ValueError where that layer has none."""
    found = memory.state[layer]
    if not isinstance(found, MambaState):
        raise ValueError(f"layer {layer} of the memory has no scan: it is of another model")
    return found


def _read(
    model: LM, ids: Tensor, state: State | None, segments: Segments
) -> tuple[State, tuple[Tensor | None, ...]]:
    mixers = scans(model)
    found: dict[int, Tensor] = {}
    hooks = [_watch(mixer, i, segments, found) for i, mixer in mixers.items()]
    try:
        out = model.eval()(ids, state, segments, logits="last")
    finally:
        for hook in hooks:
            hook.remove()
    return out.state, tuple(found.get(i) for i in range(len(out.state)))


def _watch(
    mixer: Mamba, i: int, segments: Segments, found: dict[int, Tensor]
) -> torch.utils.hooks.RemovableHandle:
    def keep(module: nn.Module, arguments: tuple[Tensor, ...], delta: Tensor) -> None:
        del module, arguments
        _, _, bias = mixer.ssm()
        step = F.softplus(delta.to(bias.dtype) + bias)
        found[i] = step.masked_fill(~segments.real.unsqueeze(-1), 0).sum(dim=1)

    return mixer.delta_proj.register_forward_hook(keep)
