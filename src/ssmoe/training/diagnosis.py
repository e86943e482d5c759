"""Where a step left the numbers: which weights, which layer, or whose gradients."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ssmoe.model.layer import LayerOut
from ssmoe.model.lm import LM


def where_not_finite(model: LM, work: Callable[[], object]) -> str:
    """What is not finite first: weights, the output of a layer, the loss, gradients; in words.

    work: the forward and backward passes of the step, with the weights it was taken from. Gradients are None
    afterwards.
    """
    if weights := _broken((name, p) for name, p in model.named_parameters()):
        return f"weights that are not numbers: {_some(weights)}"
    found: list[int] = []
    handles = [layer.register_forward_hook(partial(_look, found, i)) for i, layer in enumerate(model.layers)]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    if found:
        kind = type(model.layers[found[0]].get_submodule("layer")).__name__
        return f"the first values that are not numbers come out of layer {found[0]} ({kind})"
    broken = _broken(gradients.items())
    if broken and len(broken) == len(gradients):
        return "every layer gives numbers, the loss and all gradients are none"
    if broken:
        return f"every layer gives numbers, these gradients are none: {_some(broken)}"
    size, name = max((float(gradient.abs().max()), name) for name, gradient in gradients.items())
    if size**2 > torch.finfo(torch.float32).max:
        return f"the gradients are numbers, but too large to add their squares: {size:.1g} in {name}"
    return "a second pass over the same batch gives numbers"


def _look(found: list[int], index: int, layer: nn.Module, inputs: object, out: LayerOut) -> None:
    del layer, inputs
    if not found and not bool(out.x.isfinite().all()):
        found.append(index)


def _broken(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [name for name, tensor in tensors if not bool(tensor.isfinite().all())]


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest}"
