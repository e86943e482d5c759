"""Muon for hidden matrices, AdamW for everything else, as one optimiser (`ssmoe.ops.reference.muon_step`).

For a single matrix and JORDAN it is `torch.optim.Muon` with adjust_lr_fn = "match_rms_adamw"; here a bank of
experts (e, out, in) is e matrices, matrices of equal shape are orthogonalised together, and nothing waits for
the device, so that a step can be captured in a CUDA graph.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmoe.ops import load
from ssmoe.ops.reference.muon_step import Iteration
from ssmoe.training.adamw import count_versions

JORDAN = Iteration(((3.4445, -4.7750, 2.0315),) * 5, tight=False)
"""Jordan's own: singular values from 1 down to 0.0016 of the norm end between 0.68 and 1.21."""
POLAR = Iteration(
    (
        (8.3015, -24.0407, 17.4686),
        (4.0047, -2.9237, 0.542),
        (3.4746, -2.5521, 0.5005),
        (2.4945, -1.838, 0.4372),
    ),
    tight=True,
)
"""Each pass is the odd quintic nearest to 1 on the range that the one before leaves, narrowed by 1 % against
rounding (arXiv 2505.16932): singular values from 1 down to 0.0031 of the tighter bound end between 0.78 and
1.21, in four passes. Without the 1 % bfloat16 made values of 2 to 6."""
ITERATIONS = {"jordan": JORDAN, "polar": POLAR}
_AT_ONCE = 2**25
"""Values orthogonalised together, unless one parameter has more; bounds the memory of a step."""
_Triple = tuple[Tensor, Tensor, Tensor]
"""Parameter, gradient and momentum, each (n, out, in)."""


class Muon(torch.optim.AdamW):
    """`groups` as torch's, with "parts" in each: 0 is AdamW; otherwise a parameter (out, in) is that many
    matrices (out / parts, in) one below the other, or, with 1, a bank (e, out, in) of them.

    A parameter of Muon has the state "momentum", in its own dtype; a group may have a "momentum" of its own.
    `lr` of a group may be a tensor on the device, as in AdamW. update: the op, of the backend that the
    parameters are on; None is the reference's.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        iteration: Iteration = POLAR,
        update: Callable[..., None] | None = None,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.iteration = iteration
        self.update = update or load("reference").muon_step
        for group in self.param_groups:
            group.setdefault("parts", 0)
            group.setdefault("momentum", momentum)
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
        try:
            for group in groups:
                if group["parts"]:
                    self._update(group)
            self.param_groups = [group for group in groups if not group["parts"]]
            super().step()
        finally:
            self.param_groups = groups
            count_versions(groups)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        matrices = [
            _matrices(parameter, parameter.grad, self._momentum(parameter), parts=group["parts"])
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for batch in _batches(matrices):
            parameters, gradients, momenta = zip(*batch, strict=True)
            self.update(
                parameters,
                gradients,
                momenta,
                rate=group["lr"],
                decay=group["weight_decay"],
                mu=group["momentum"],
                iteration=self.iteration,
            )

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


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
