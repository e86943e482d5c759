"""One token through a residual Mamba sub-layer on the CPU: `ssmoe.ops.reference.mamba_step` in one call.

`csrc/mamba_step.h` has the kernels, `csrc/decode.cpp` their order. Many rows are left to the backend's ops.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmoe.ops.cpu.causal_conv1d import causal_conv1d
from ssmoe.ops.cpu.linear import linear
from ssmoe.ops.cpu.selective_scan import selective_scan
from ssmoe.ops.reference.mamba_step import Layer, by_parts, check, in_turn

_MOST = 16
"""Rows from which matrix products that reuse the weights in registers are faster."""


def mamba_step(
    x: Tensor,
    norm_weight: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    delta_proj: Tensor,
    A_log: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    out_proj: Tensor,
    *,
    norm_eps: float,
    norm_bias: Tensor | None = None,
    conv_state: Tensor,
    ssm_state: Tensor,
    out_conv: Tensor | None = None,
    out_ssm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, conv, ssm); the reference has shapes and meaning."""
    if x.shape[0] > _MOST or x.dtype.itemsize > ssm_state.dtype.itemsize or torch.is_grad_enabled():
        return by_parts(
            linear, causal_conv1d, selective_scan,
            x, norm_weight, in_proj, conv_weight, conv_bias, x_proj, delta_proj, A_log, D, delta_bias,
            out_proj, norm_eps=norm_eps, norm_bias=norm_bias, conv_state=conv_state, ssm_state=ssm_state,
            out_conv=out_conv, out_ssm=out_ssm,
        )  # fmt: skip
    if x.dtype not in (conv_state.dtype, ssm_state.dtype):
        x = x.to(conv_state.dtype)
    weights = (
        norm_weight, norm_bias, norm_eps, in_proj, conv_weight, conv_bias, x_proj, delta_proj, A_log, D,
        delta_bias, out_proj,
    )  # fmt: skip
    try:
        if out_conv is None and out_ssm is None:
            return torch.ops.ssmoe.mamba_step(x, *weights, conv_state, ssm_state)
        out_conv = torch.empty_like(conv_state) if out_conv is None else out_conv
        out_ssm = torch.empty_like(ssm_state) if out_ssm is None else out_ssm
        y = torch.ops.ssmoe.mamba_step_into(
            x,
            *weights,
            None if conv_state is out_conv else conv_state,
            None if ssm_state is out_ssm else ssm_state,
            out_conv,
            out_ssm,
        )
    except RuntimeError:
        # the kernel's refusal, as the error that every backend gives
        check(
            x, norm_weight, in_proj, conv_weight, conv_bias, x_proj, delta_proj, A_log, D, delta_bias,
            out_proj, norm_bias=norm_bias, conv_state=conv_state, ssm_state=ssm_state, out_conv=out_conv,
            out_ssm=out_ssm,
        )  # fmt: skip
        raise
    return y, out_conv, out_ssm


def mamba_steps(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    norm_eps: float,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
    out_convs: Sequence[Tensor] | None = None,
    out_ssms: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """`mamba_step` through several layers of one shape; see the reference."""
    rows, dtype, wide = x.shape[0], conv_states[0].dtype, ssm_states[0].dtype
    fresh = out_convs is None and out_ssms is None
    if fresh and rows <= _MOST and x.dtype in (dtype, wide) and not torch.is_grad_enabled() and layers:
        biased = layers[0][1] is not None
        weights = [t for weight, bias, *rest in layers for t in (weight, *rest, *((bias,) if biased else ()))]
        y, convs, ssms = torch.ops.ssmoe.mamba_steps(
            x, weights, biased, norm_eps, list(conv_states), list(ssm_states)
        )
        return y, convs.unbind(0), ssms.unbind(0)
    return in_turn(
        mamba_step, x, layers, norm_eps=norm_eps, conv_states=conv_states, ssm_states=ssm_states,
        out_convs=out_convs, out_ssms=out_ssms,
    )  # fmt: skip


def _step_fake(x: Tensor, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    conv, ssm = tensors[-2:]
    return x.new_empty(x.shape), conv.new_empty(conv.shape), ssm.new_empty(ssm.shape)


def _step_into_fake(x: Tensor, *tensors: Any) -> Tensor:
    return x.new_empty(x.shape)


def _steps_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biased: bool,
    norm_eps: float,
    conv: Sequence[Tensor],
    ssm: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        conv[0].new_empty(len(conv), *conv[0].shape),
        ssm[0].new_empty(len(ssm), *ssm[0].shape),
    )


torch.library.register_fake("ssmoe::mamba_step", _step_fake)
torch.library.register_fake("ssmoe::mamba_steps", _steps_fake)
torch.library.register_fake("ssmoe::mamba_step_into", _step_into_fake)
