"""A step's numbers on their way from the device: two copies, whatever the number of layers, and no waiting.

A GPU is asked for a step long before it has done it. Reading one number of the step would wait for all of it,
and the next step's kernels could not be launched meanwhile.
"""

import torch
from torch import Tensor

from ssmoe.model.layer import RouterStats
from ssmoe.training.step import StepResult


class Arrival:
    """The numbers of `result`, copied to the CPU once the device has them; on a CPU nothing is copied."""

    def __init__(self, result: StepResult) -> None:
        self._result = result
        self._event: torch.cuda.Event | None = None
        tensors = _tensors(result)
        device = result.lm.device
        if device.type == "cpu":
            self._copies = tensors
            return
        self._copies = unpack([_pinned(packed) for packed in pack(tensors)], tensors)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> StepResult:
        """The result with its numbers on the CPU; its `state` stays where it is."""
        if self._event is not None:
            self._event.synchronize()
        numbers = iter(self._copies)
        lm, balance, z, grad_norm = (next(numbers) for _ in range(4))
        routers = {
            i: RouterStats(*(next(numbers) for _ in stats)) for i, stats in self._result.routers.items()
        }
        return StepResult(lm, balance, z, grad_norm, routers, self._result.state)


def pack(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """All floating values and all integers, each in one vector. A float32 never holds an integer."""
    floats = [t.detach().reshape(-1) for t in tensors if t.is_floating_point()]
    integers = [t.reshape(-1) for t in tensors if not t.is_floating_point()]
    return torch.cat(floats), torch.cat(integers) if integers else torch.empty(0, dtype=torch.int64)


def unpack(packed: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """What `pack` joined, as views where the dtypes are equal, in the shapes of `like`."""
    floats, integers = packed
    pieces: list[Tensor] = []
    used = [0, 0]
    for tensor in like:
        which = 0 if tensor.is_floating_point() else 1
        vector = (floats, integers)[which]
        pieces.append(vector[used[which] : used[which] + tensor.numel()].view(tensor.shape))
        used[which] += tensor.numel()
    return pieces


def _tensors(result: StepResult) -> list[Tensor]:
    of_routers = (tensor for stats in result.routers.values() for tensor in stats)
    return [result.lm, result.balance, result.z, result.grad_norm, *of_routers]


def _pinned(packed: Tensor) -> Tensor:
    """A copy under way into memory that the device writes by itself."""
    target = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    return target.copy_(packed, non_blocking=True)
