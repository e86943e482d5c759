"""One update of AdamW (arXiv 1711.05101, algorithm 2), in place."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    scale: Tensor | None = None,
) -> None:
    """Update parameters, means and squares, each a sequence of tensors of the parameters' shapes.

    Gradients may be narrower than the rest.
    steps: () a parameter, which number of update this is, from 1 on. rate: a number, or a tensor () on the
    device. scale: (), what gradients are divided by.
    """
    beta1, beta2 = betas
    for parameter, gradient, mean, square, step in zip(
        parameters, gradients, means, squares, steps, strict=True
    ):
        slope = gradient.to(mean.dtype) if scale is None else gradient.to(mean.dtype) / scale
        mean.lerp_(slope, 1 - beta1)
        square.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
        # in float32 the differences would keep four digits
        first, second = (1 - torch.pow(beta, step.double()) for beta in betas)
        parameter.mul_(1 - rate * decay)
        parameter.sub_((rate / first) * mean / (square.sqrt() / second.sqrt() + eps))
