"""Muon for hidden matrices, AdamW for everything else, as one optimiser.

M <- mu M + (1 - mu) G;  W <- (1 - lr decay) W - lr 0.2 sqrt(max(out, in)) orthogonalise(mu M + (1 - mu) G)
(Jordan 2024; the factor is arXiv 2502.16982, equation 4: the update's root mean square is then AdamW's, so
that AdamW's learning rate and weight decay carry over). For a single matrix it is `torch.optim.Muon` with
adjust_lr_fn = "match_rms_adamw"; here a bank of experts (e, out, in) is e matrices, matrices of equal shape
are orthogonalised together, and nothing waits for the device, so that a step can be captured in a CUDA graph.
"""

from collections.abc import Callable, Iterable, Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ssmoe.training.orthogonalise import orthogonalise

MATCH_ADAMW = 0.2
"""Root mean square of AdamW's update, in learning rates (arXiv 2502.16982, section 2.2)."""
_AT_ONCE = 2**25
"""Values orthogonalised together, unless one parameter has more; bounds the memory of a step."""

_Triple = tuple[Tensor, Tensor, Tensor]
"""Parameter, gradient and momentum, each (n, out, in)."""


class Muon(torch.optim.AdamW):
    """`groups` as torch's, with "parts" in each: 0 is AdamW; otherwise a parameter (out, in) is that many
    matrices (out / parts, in) one below the other, or, with 1, a bank (e, out, in) of them.

    A parameter of Muon has the state "momentum", in its own dtype. Products are bfloat16 on a GPU, and of the
    parameter's dtype elsewhere. `lr` of a group may be a tensor on the device, as in AdamW.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum = momentum
        for group in self.param_groups:
            group.setdefault("parts", 0)
            for parameter in group["params"] if group["parts"] else ():
                _check(parameter, group["parts"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group["parts"]:
                self._update(group)
        self.param_groups = [group for group in groups if not group["parts"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        rate: float | Tensor = group["lr"]
        matrices: list[_Triple] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            momentum = self._momentum(parameter).lerp_(parameter.grad, 1 - self.momentum)
            if group["weight_decay"]:
                parameter.mul_(1 - rate * group["weight_decay"])
            matrices.append(_matrices(parameter, parameter.grad, momentum, parts=group["parts"]))
        for batch in _batches(matrices):
            self._orthogonal_step(batch, rate)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]

    def _orthogonal_step(self, batch: list[_Triple], rate: float | Tensor) -> None:
        """batch: of equal out and in."""
        first = batch[0][0]
        sizes = [parameter.shape[0] for parameter, _, _ in batch]
        narrow = first.is_cuda and first.dtype == torch.float32
        dtype = torch.bfloat16 if narrow else first.dtype
        x = torch.empty((sum(sizes), *first.shape[1:]), dtype=dtype, device=first.device)
        for piece, (_, gradient, momentum) in zip(torch.split(x, sizes), batch, strict=True):
            # Nesterov's step but for a factor, which orthogonalising takes out
            torch.add(momentum, gradient, alpha=1 / self.momentum - 1, out=piece)
        x = orthogonalise(x)
        factor = MATCH_ADAMW * sqrt(max(first.shape[1:]))
        for piece, (parameter, _, _) in zip(torch.split(x, sizes), batch, strict=True):
            if isinstance(rate, Tensor):
                parameter.addcmul_(piece, rate, value=-factor)
            else:
                parameter.add_(piece, alpha=-factor * rate)


def _matrices(parameter: Tensor, gradient: Tensor, momentum: Tensor, *, parts: int) -> _Triple:
    """Each (out, in) or (e, out, in) as (n, out / parts, in)."""
    if parameter.ndim == 3:
        return parameter, gradient, momentum
    shape = (parts, parameter.shape[0] // parts, parameter.shape[1])
    return parameter.view(shape), gradient.reshape(shape), momentum.view(shape)


def _batches(matrices: list[_Triple]) -> Iterator[list[_Triple]]:
    """Those of equal shape together, up to `_AT_ONCE` values."""
    shapes: dict[torch.Size, list[_Triple]] = {}
    for triple in matrices:
        shapes.setdefault(triple[0].shape[1:], []).append(triple)
    for members in shapes.values():
        batch: list[_Triple] = []
        for triple in members:
            if batch and sum(m[0].numel() for m in batch) + triple[0].numel() > _AT_ONCE:
                yield batch
                batch = []
            batch.append(triple)
        yield batch


def _check(parameter: Tensor, parts: int) -> None:
    bank = parameter.ndim == 3 and parts == 1
    if not bank and (parameter.ndim != 2 or parameter.shape[0] % parts):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} is no {parts} matrices: give it parts=0 (AdamW)"
        )
    if not parameter.is_contiguous():
        raise ValueError("Muon updates views of a parameter: make the parameter contiguous")
