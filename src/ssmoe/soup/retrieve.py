"""Which memories are alike: cosine similarity of the scan states of chosen layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.model.mixers.mamba import MambaState
from ssmoe.soup.capture import Memory, scan_state


def similarities(
    queries: Sequence[Memory],
    library: Sequence[Memory],
    layers: Sequence[int] | None = None,
    *,
    centre: bool = False,
) -> Tensor:
    """(q, k): the mean over `layers` (None is all with a scan) of the cosine between scan states.

    centre: the library's mean state is first subtracted from all, which leaves what sets one memory apart
    from another. Every memory has one row. Raises ValueError for a layer without a scan and for memories of
    several rows.
    """
    left, right = _vectors(queries, layers), _vectors(library, layers)
    if centre:
        means = [states.mean(0) for states in right]
        left = [states - mean for states, mean in zip(left, means, strict=True)]
        right = [states - mean for states, mean in zip(right, means, strict=True)]
    pairs = zip(left, right, strict=True)
    return torch.stack([F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).t() for a, b in pairs]).mean(0)


def nearest(
    query: Memory, library: Sequence[Memory], layers: Sequence[int] | None = None, *, centre: bool = False
) -> list[int]:
    """The places of all of `library`, most similar first; ties go to the earlier one."""
    found = similarities([query], library, layers, centre=centre)
    return [int(i) for i in found[0].sort(descending=True, stable=True).indices]


def _vectors(memories: Sequence[Memory], layers: Sequence[int] | None) -> list[Tensor]:
    """For each layer (k, d_inner * d_state)."""
    if not memories:
        raise ValueError("there are no memories to compare: save some first")
    state = memories[0].state
    with_scan = [i for i, layer in enumerate(state) if isinstance(layer, MambaState)]
    chosen = with_scan if layers is None else list(layers)
    if not chosen or not set(chosen) <= set(with_scan):
        raise ValueError(f"layers={chosen} must name layers with a scan: {with_scan}")
    states = [[scan_state(memory, i).ssm for memory in memories] for i in chosen]
    if any(state.shape[0] != 1 for layer in states for state in layer):
        raise ValueError("a memory to compare must have one row: use ssmoe.state.select")
    return [torch.stack([state.flatten() for state in layer]) for layer in states]
