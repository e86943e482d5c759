"""States as numbers to draw: norms and half-lives a layer, which are alike, and where they lie in a plane."""

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class Overview(NamedTuple):
    """Of k states of l layers with a scan; every state's rows are taken together.

    norms: (k, l), of each scan state. steps: (k, l), the mean sum of delta', nan where it was not kept: a
    state's slowest part has decayed by exp(-steps) since the text began. similarity: (k, k), the mean cosine
    over the layers. places: (k, 2), the first two principal components of the states, each layer scaled to
    length 1.
    """

    layers: tuple[str, ...]
    norms: Tensor
    steps: Tensor
    similarity: Tensor
    places: Tensor


def overview(states: Mapping[str, Mapping[str, Tensor]]) -> Overview:
    """states: by name, the tensors of a state file. Raises ValueError where they do not fit together."""
    found = {name: _scans(tensors) for name, tensors in states.items()}
    first = next(iter(found.values())) if found else None
    if not first:
        raise ValueError("there is no state with a scan to draw: give files that `ssmoe state save` wrote")
    for name, scans in found.items():
        if {layer: t.shape for layer, t in scans.items()} != {layer: t.shape for layer, t in first.items()}:
            raise ValueError(
                f"{name} has other layers, sizes or rows than the first: draw states of one model"
            )
    layers = tuple(first)
    flat = {
        layer: torch.stack([scans[layer].double().flatten() for scans in found.values()]) for layer in layers
    }
    steps = [[_mean_step(tensors, layer) for layer in layers] for tensors in states.values()]
    unit = [F.normalize(values, dim=-1) for values in flat.values()]
    return Overview(
        layers=layers,
        norms=torch.stack([values.norm(dim=-1) for values in flat.values()], 1),
        steps=torch.tensor(steps),
        similarity=torch.stack([values @ values.t() for values in unit]).mean(0),
        places=_plane(torch.cat(unit, 1)),
    )


def _scans(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith("layers.") and name.endswith(".ssm")]
    return {
        name.split(".")[1]: tensors[name] for name in sorted(names, key=lambda name: int(name.split(".")[1]))
    }


def _mean_step(tensors: Mapping[str, Tensor], layer: str) -> float:
    found = tensors.get(f"extra.steps.{layer}")
    return float("nan") if found is None else float(found.double().mean())


def _plane(points: Tensor) -> Tensor:
    """(k, n) -> (k, 2)"""
    centred = points - points.mean(0)
    # k is small and n large: the components from the k by k products
    found = cast(tuple[Tensor, Tensor], torch.linalg.eigh(centred @ centred.t()))
    values, vectors = found[0].flip(0).clamp(min=0), found[1].flip(1)
    places = vectors * values.sqrt()
    # the sign of a component means nothing: the largest entry is positive
    signs = places.gather(0, places.abs().argmax(0, keepdim=True)).sign()
    places = places * torch.where(signs == 0, 1.0, signs)
    return F.pad(places, (0, max(0, 2 - places.shape[1])))[:, :2]
