"""Which memories are alike: cosine similarity of the scan states of chosen layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.model.mixers.mamba import MambaState
from ssmoe.soup.capture import Memory, scan_state


def similarities(
    queries: Sequence[Memory], library: Sequence[Memory], layers: Sequence[int] | None = None
) -> Tensor:
    """(q, k): the mean over `layers` (None is all with a scan) of the cosine between scan states.

    Every memory has one row. Raises ValueError for a layer without a scan and for memories of several rows.
    """
    left, right = _vectors(queries, layers), _vectors(library, layers)
    return torch.stack([a @ b.t() for a, b in zip(left, right, strict=True)]).mean(0)


def nearest(query: Memory, library: Sequence[Memory], layers: Sequence[int] | None = None) -> list[int]:
    """The places of all of `library`, most similar first; ties go to the earlier one."""
    order = similarities([query], library, layers)[0].sort(descending=True, stable=True).indices
    return [int(i) for i in order]


def _vectors(memories: Sequence[Memory], layers: Sequence[int] | None) -> list[Tensor]:
    """For each layer (k, d_inner * d_state), of length 1."""
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
    return [F.normalize(torch.stack([state.flatten() for state in layer]), dim=-1) for layer in states]
