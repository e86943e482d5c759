"""What every op checks before a launch, and on which device it launches."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes the host a microsecond and a half."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def check_activations(**tensors: Tensor | None) -> None:
    """float32 or bfloat16, all on one device."""
    present = {name: t for name, t in tensors.items() if t is not None}
    devices = {t.device for t in present.values()}
    if len(devices) > 1:
        raise ValueError(f"{', '.join(present)} are on several devices: {', '.join(map(str, devices))}")
    for name, tensor in present.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{name} is {tensor.dtype}: the triton backend takes float32 and bfloat16")


def check_shape(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Each tensor, where given, has the shape beside it."""
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def row_major(x: Tensor) -> Tensor:
    """x itself if its last axis is dense, so that slices of a projection need no copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """The device that Triton launches on; the interpreter, for CPU tensors, needs none."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def direct(op: Any, x: Tensor) -> Callable[..., Any]:
    """The function of a custom op without the op, where nothing has to see it.

    That is where x is a plain tensor and neither gradients nor a compiler are at work. torch's way to the function
    takes the host longer than the launch of a kernel.
    """
    return op if watched(x) else op._init_fn


def watched(x: Tensor) -> bool:
    """Whether gradients, a compiler or a subclass of Tensor have to see what is done with x."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor


def some(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Every tensor, dense; the kernel never reads the stand-in of an absent one."""
    return [stand_in if t is None else t.contiguous() for t in tensors]


_zeros: dict[tuple[torch.device, int], list[Tensor]] = {}
"""The last of a list is in use; those before it had become too small, but a captured graph may still use them."""


def counters(x: Tensor, size: int) -> Tensor:
    """At least `size` int32 zeros, which kernels leave at zero; one set a stream, whose kernels run in turn."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    kept = _zeros.setdefault((x.device, stream), [])
    if kept and kept[-1].numel() >= size:
        return kept[-1]
    found = torch.zeros(max(size, 4096), dtype=torch.int32, device=x.device)
    # memory taken during a capture belongs to its graph, which clears it each time
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        kept.append(found)
    return found


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, without a rounding in between where bfloat16 operands give float32."""
    if a.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.float() @ b.float()
    return (a @ b).to(dtype)


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype that the gradient of a parameter is wanted in: its own, or what was set as its `grad_dtype`."""
    if torch.compiler.is_compiling() or not parameter.is_leaf:
        return parameter.dtype
    return getattr(parameter, "grad_dtype", None) or parameter.dtype
