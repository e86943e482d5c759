"""A running average of the weights, for evaluations and the checkpoint's weights.

The weight of step i after t steps is proportional to i^g (arXiv 2312.02696, section 3.1), so that the
average reaches back over the same share of the steps at any time: no horizon has to be chosen for a run.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Keeps the average of a model's trainable parameters, in their own dtype and on their device.

    share: the mean age of the averaged weights as a share of the steps so far; g = 1 / share - 2, so that 0.5
    weighs all steps alike.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self._exponent = 1 / share - 1
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._values = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 1."""
        kept = (1 - 1 / step) ** self._exponent
        for name, value in self._values.items():
            value.lerp_(self._parameters[name], 1 - kept)

    @contextmanager
    def applied(self) -> Generator[None]:
        """The model has the averaged weights inside, and its own again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights by name; inside `applied` the model's own."""
        return self._values

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, value in self._values.items():
            value.copy_(tensors[name])

    @torch.no_grad()
    def _swap(self) -> None:
        """By copying, so that whatever watches a parameter's version sees a change."""
        for name, parameter in self._parameters.items():
            own = parameter.clone()
            parameter.copy_(self._values[name])
            self._values[name].copy_(own)
