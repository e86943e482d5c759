"""torch's AdamW, whose large parameters on a GPU are updated by an op of ours (`ops.adamw_step`).

torch's kernel writes scaled gradients back, which is one more pass over them, and reaches two thirds of a
GPU's memory speed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

LARGE = 2**20
"""Values from which on a launch of its own pays for a parameter."""


class AdamW(torch.optim.AdamW):
    """torch's, fused, with the same state. update: the op, of the backend that the parameters are on.

    narrow: parameters whose gradients may be bfloat16; the op takes them, torch does not. `grad_scale`, a
    tensor (), divides every gradient, as in torch.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        update: Callable[..., None],
        narrow: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.update = update
        self.narrow = narrow

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hidden: list[tuple[Tensor, Tensor]] = []
        try:
            for group in self.param_groups:
                owners = [parameter for parameter in group["params"] if parameter.grad is not None]
                large = [parameter for parameter in owners if is_large(parameter)]
                if large:
                    self._update(large, group)
                # torch passes over what has no gradient
                for parameter in large:
                    hidden.append((parameter, parameter.grad))
                    parameter.grad = None
            super().step()
        finally:
            for parameter, gradient in hidden:
                parameter.grad = gradient
            count_versions(self.param_groups)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state(parameter) for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        self.update(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            steps,
            rate=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            decay=group["weight_decay"],
            scale=getattr(self, "grad_scale", None),
        )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def count_versions(groups: Iterable[dict[str, Any]]) -> None:
    """Whatever has a gradient was changed: kernels of our own and torch's fused ones do so unseen."""
    increment_version([p for group in groups for p in group["params"] if p.grad is not None])


def is_large(parameter: Tensor) -> bool:
    """Whether the op updates a parameter, whose gradient may then be narrower."""
    return (
        parameter.is_cuda
        and parameter.numel() >= LARGE
        and parameter.dtype == torch.float32
        and parameter.is_contiguous()
    )
