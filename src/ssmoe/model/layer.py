"""The contract of every layer: forward(x, state, segments) -> LayerOut(x, state, stats), for any length >= 1.

Prefill, chunked prefill, decoding, truncated back-propagation and packing are this one function. State and
statistics are values that go in and out; a layer keeps neither.

Dimensions in comments: b batch, l length, d channels, n state, t = b*l tokens, e experts, k top-k, f expert
width, h heads, c capacity.
"""

from typing import Any, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from ssmoe.config.load import describe
from ssmoe.ops import Ops, Segments

LayerState = tuple[Any, ...]
"""A NamedTuple of tensors with the batch first, or () for a layer without state."""

State = tuple[LayerState, ...]
"""One LayerState a layer."""


class RouterStats(NamedTuple):
    """What a router did with the tokens of one forward pass; padding is excluded everywhere.

    balance, z: () float32 losses, differentiable, their coefficients applied.
    load: (e,) int64 assignments before capacity, or (r, e) in a layer of r routers. dropped: () int64
        assignments lost to capacity.
    confidence: () mean probability of the first choice. entropy: () mean entropy of a token's
        probabilities, in nats.
    """

    balance: Tensor
    z: Tensor
    load: Tensor
    dropped: Tensor
    confidence: Tensor
    entropy: Tensor


class LayerOut(NamedTuple):
    """x: (b, l, d_model). state: what a continuation starts from. stats: of a router, else None."""

    x: Tensor
    state: LayerState
    stats: RouterStats | None


class Layer(Protocol):
    """What a stack needs of a layer."""

    batch_dependent: bool
    """In training mode, or in every mode (expert choice, Mixture of Tokens), a token's output depends on the
    other rows of the batch."""

    def __call__(
        self, x: Tensor, state: LayerState | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """x: (b, l, d_model). state: None is that of `init_state`."""
        ...

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerState:
        """What a document begins from, zeros unless it is learned.

        capacity: tokens of room where a layer stores tokens.
        """
        ...


COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError for a dtype that nothing is computed in; None is left to the parameters."""
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise ValueError(
            f"{dtype!r} is no dtype to compute in: use torch.float32, torch.bfloat16 or, on a CPU, "
            "torch.float64"
        )


def check_input(x: Tensor, d_model: int, ops: Ops) -> None:
    """Raise ValueError for an x that a layer of width `d_model` with the kernels `ops` does not take."""
    check_dtype(x.dtype)
    if x.ndim != 3 or x.shape[2] != d_model:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, length, {d_model})")
    if ops.name == "cpu" and x.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"x is on {x.device.type} and the layer has the kernels of a CPU: build the model with device="
            f"{x.device.type!r}, or give a plain layer ops=ssmoe.ops.load('auto', {x.device.type!r})"
        )


def check_options(kind: type[BaseModel], d_model: int, **options: object) -> None:
    """Raise ValueError for options of a plain layer that its kind of configuration refuses."""
    if d_model < 1:
        raise ValueError(f"d_model={d_model}: give at least 1")
    try:
        kind.model_validate(options)
    except ValidationError as error:
        raise ValueError(describe(error)) from error
