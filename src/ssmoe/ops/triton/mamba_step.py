"""One token through a residual Mamba sub-layer on the GPU: `ssmoe.ops.reference.mamba_step`, by parts."""

from torch import Tensor

from ssmoe.ops.reference.linear import linear
from ssmoe.ops.reference.mamba_step import by_parts
from ssmoe.ops.triton.causal_conv1d import causal_conv1d
from ssmoe.ops.triton.selective_scan import selective_scan


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
    return by_parts(
        linear, causal_conv1d, selective_scan,
        x, norm_weight, in_proj, conv_weight, conv_bias, x_proj, delta_proj, A_log, D, delta_bias, out_proj,
        norm_eps=norm_eps, norm_bias=norm_bias, conv_state=conv_state, ssm_state=ssm_state,
        out_conv=out_conv, out_ssm=out_ssm,
    )  # fmt: skip
