"""A text's state with its accumulated decay, which is what states need to be mixed in sequence.

h(s1 s2) = P(s2) h(s1) + h(s2) with P(s) = exp(A sum_{t in s} delta'_t), element by element: exact for a layer
whose inputs are given, so for a model's first layer, and an approximation above it (State Soup, arXiv
2406.08423).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.model.mixers.mamba import Mamba, MambaState
from ssmoe.ops import Segments


class Memory(NamedTuple):
    """What a text leaves behind, one row a text.

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
    mixers = scans(model)
    found: dict[int, Tensor] = {}
    hooks = [_watch(mixer, i, found) for i, mixer in mixers.items()]
    try:
        # one document that goes on: with segments given, a single token is not taken in one fused op
        whole = Segments.ragged([ids.shape[1]] * ids.shape[0], device=ids.device)
        out = model.eval()(ids, state, whole, logits="last")
    finally:
        for hook in hooks:
            hook.remove()
    steps = tuple(found.get(i) for i in range(len(out.state)))
    return Memory(out.state, steps, ids.shape[1])


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


def scan_state(memory: Memory, layer: int) -> MambaState:
    """The state of a layer with a scan. Raises ValueError where that layer has none."""
    found = memory.state[layer]
    if not isinstance(found, MambaState):
        raise ValueError(f"layer {layer} of the memory has no scan: it is of another model")
    return found


def _watch(mixer: Mamba, i: int, found: dict[int, Tensor]) -> torch.utils.hooks.RemovableHandle:
    def keep(module: nn.Module, arguments: tuple[Tensor, ...], delta: Tensor) -> None:
        del module, arguments
        _, _, bias = mixer.ssm()
        found[i] = F.softplus(delta.to(bias.dtype) + bias).sum(dim=1)

    return mixer.delta_proj.register_forward_hook(keep)
