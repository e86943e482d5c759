"""The numerics: names and signatures of every op, and the one place where a backend is chosen.

A backend is a folder that exports the names of `Ops` with the signatures of `ssmoe.ops.reference`, which is
the definition. `resolve` turns "auto" into a name once, when a model is built; nothing is re-decided later.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.ops import extension
from ssmoe.ops.reference.route import Routed
from ssmoe.ops.segments import Segments

__all__ = ["BACKENDS", "Ops", "Segments", "describe", "load", "missing", "resolve", "settled"]

BACKENDS = ("reference", "cpu", "triton")


class Ops(NamedTuple):
    """The ops of one backend. `ssmoe.ops.reference` documents each."""

    name: str
    selective_scan: Callable[..., tuple[Tensor, Tensor]]
    causal_conv1d: Callable[..., tuple[Tensor, Tensor]]
    expert_mlp: Callable[..., Tensor]
    expert_linear: Callable[..., Tensor]
    embedding: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    muon_step: Callable[..., None]
    adamw_step: Callable[..., None]
    split_linear: Callable[..., tuple[Tensor, ...]]
    fork_linear: Callable[..., tuple[Tensor, Tensor]]
    fork_wide: Callable[..., tuple[Tensor, Tensor]]
    head_cross_entropy: Callable[..., Tensor]
    residual_norm: Callable[..., tuple[Tensor, Tensor]]
    residual_sum: Callable[..., Tensor]
    wide_linear: Callable[..., Tensor]
    route: Callable[..., Routed]
    mamba_step: Callable[..., tuple[Tensor, Tensor, Tensor]]
    mamba_steps: Callable[..., tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]]
    attention_step: Callable[..., Tensor]
    moe_step: Callable[..., Tensor]
    argmax: Callable[..., Tensor]


def missing(backend: str) -> str | None:
    """Why a backend cannot be loaded on this machine, in one line; None when it can."""
    match backend:
        case "cpu":
            return extension.missing()
        case "triton" if find_spec("triton") is None:
            return "the GPU kernels need triton: pip install triton"
        case _:
            return None


def describe(backend: str) -> dict[str, str]:
    """What a backend chose on this machine, such as its instruction level; {} where it chooses nothing."""
    if backend != "cpu":
        return {}
    from ssmoe.ops.cpu import describe as describe_cpu

    return describe_cpu()


def resolve(backend: str, device: str) -> str:
    """The backend's name for a device type ("cpu", "cuda", ...); "auto" picks the fastest one present.

    On a CPU that is "cpu", or "reference" where the kernels were not built: `missing("cpu")` then says why.

    Raises ValueError for an unknown name, and for "auto" on a device that has no kernels here: a slower
    backend must be named, never fallen back to.
    """
    if backend in BACKENDS:
        return backend
    if backend != "auto":
        raise ValueError(f"backend={backend!r} is not one of: auto, {', '.join(BACKENDS)}")
    if device == "cpu":
        return "reference" if missing("cpu") else "cpu"
    if device == "cuda":
        if reason := missing("triton"):
            raise ValueError(f"{reason}, or pass backend='reference', which is slow")
        return "triton"
    raise ValueError(
        f"no kernels for device {device!r} yet; the reference runs there, slowly: pass backend='reference'"
    )


def settled(tensor: Tensor, backend: str) -> Tensor:
    """A contiguous copy of weights where the kernels of `backend` read them fastest.

    For "cpu", large ones on huge pages where the system has them (Linux): reading a model once a token is a
    fifth faster there.
    """
    if backend != "cpu" or tensor.device.type != "cpu" or tensor.dtype not in _SETTLED or missing(backend):
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.ops.ssmoe.settled(tensor)


_SETTLED = (torch.float32, torch.bfloat16, torch.float64)


def load(backend: str = "auto", device: str = "cpu") -> Ops:
    """The ops of a backend, imported now; see `resolve` for the names and errors."""
    match resolve(backend, device):
        case "reference":
            from ssmoe.ops import reference as module
        case "cpu":
            from ssmoe.ops import cpu as module
        case "triton":
            from ssmoe.ops import triton as module
        case name:
            raise AssertionError(name)
    return Ops(
        name=resolve(backend, device),
        selective_scan=module.selective_scan,
        causal_conv1d=module.causal_conv1d,
        expert_mlp=module.expert_mlp,
        expert_linear=module.expert_linear,
        embedding=module.embedding,
        linear=module.linear,
        muon_step=module.muon_step,
        adamw_step=module.adamw_step,
        split_linear=module.split_linear,
        fork_linear=module.fork_linear,
        fork_wide=module.fork_wide,
        head_cross_entropy=module.head_cross_entropy,
        residual_norm=module.residual_norm,
        residual_sum=module.residual_sum,
        wide_linear=module.wide_linear,
        route=module.route,
        mamba_step=module.mamba_step,
        mamba_steps=module.mamba_steps,
        attention_step=module.attention_step,
        moe_step=module.moe_step,
        argmax=module.argmax,
    )
