"""Where a router's choice is a near-tie, which float32 may rightly decide the other way."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from ssmoe.model.feedforwards.expert_choice import ExpertChoice
from ssmoe.model.feedforwards.router import Router
from ssmoe.model.lm import Residual
from ssmoe.model.mixers.mamba_experts import MambaExperts
from ssmoe.model.norm import Linear

TIE = 1e-5
"""Scores closer than this are a near-tie."""


def clear(layer: Residual, x: Tensor) -> Tensor:
    """(b, l) bool: outputs that no near-tie touches. layer: in float64. x: (b, l, d), its input.

    A choice touches its own position, and those after it where it decides what goes into a scan. Layers that
    choose nothing, such as a mixture of tokens, are clear everywhere.
    """
    inner = layer.get_submodule("layer")
    if isinstance(inner, ExpertChoice) and inner.mode == "expert_choice":
        return _taken_clearly(inner, layer.norm(x))
    ties = {name: ~found for name, found in _chosen_clearly(layer, x).items()}
    touched = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    for name, tie in ties.items():
        touched |= tie.cummax(1).values if _feeds_scan(inner, name) else tie
    return ~touched


def _chosen_clearly(layer: Residual, x: Tensor) -> dict[str, Tensor]:
    """(b, l) for each router that is asked when `layer` reads x, by its name inside the layer."""
    found: dict[str, Tensor] = {}

    def watch(name: str, router: Router) -> torch.utils.hooks.RemovableHandle:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            del module
            found[name] = _margin(router, arguments[0]) > TIE

        return router.register_forward_pre_hook(keep)

    parts = cast(Iterable[tuple[str, nn.Module]], layer.named_modules())
    hooks = [watch(name, part) for name, part in parts if isinstance(part, Router)]
    try:
        layer(x, None, None, x.dtype)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _margin(router: Router, x: Tensor) -> Tensor:
    """(b, l): what lies between the last expert that is chosen and the first that is not."""
    k = router.top_k
    if k == router.num_experts:
        return x.new_full(x.shape[:2], torch.inf)
    scores = router.scores(router.logits(x))
    choice = scores if router.bias is None else scores + router.bias
    ordered = choice.sort(dim=-1, descending=True).values
    return ordered[..., k - 1] - ordered[..., k]


def _feeds_scan(layer: nn.Module, router: str) -> bool:
    """Whether a router's choice changes what the scan reads, and so all later positions."""
    is_conv = router.endswith(("for_conv", "shared"))
    return isinstance(layer, MambaExperts) and is_conv and not isinstance(layer.conv_proj, Linear)


def _taken_clearly(layer: ExpertChoice, x: Tensor) -> Tensor:
    """(b, l): tokens at no edge, between the last that an expert takes and the first that it leaves."""
    scores = layer.router.scores(layer.router.logits(x))
    b, length, e = scores.shape
    groups = scores.reshape(1, -1, e) if layer.group == "batch" else scores.transpose(0, 1)
    size = groups.shape[1]
    room = max(1, size * layer.router.top_k // e)
    if room >= size:
        return torch.ones(b, length, dtype=torch.bool, device=x.device)
    ordered = groups.sort(dim=1, descending=True).values
    last, first = ordered[:, room - 1 : room], ordered[:, room : room + 1]
    near = (groups > first - TIE) & (groups < last + TIE) & (last - first <= TIE)
    fine = ~near.any(-1)
    return fine.view(b, length) if layer.group == "batch" else fine.t()
