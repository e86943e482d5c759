"""One token through a whole residual Mamba sub-layer, for decoding: x + mixer(norm(x)).

The mixer is that of arXiv 2312.00752, figure 3, at length 1; nothing here is new arithmetic.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmoe.ops.reference.causal_conv1d import causal_conv1d
from ssmoe.ops.reference.linear import linear
from ssmoe.ops.reference.selective_scan import selective_scan

Layer = tuple[Tensor | None, ...]
"""Norm weight, norm bias or None, in_proj, conv_weight, conv_bias, x_proj, delta_proj, A_log, D, delta_bias,
out_proj."""


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
    """Return (y, conv, ssm): the new residual stream and the states after this token. Inference only.

    x: (b, d_model), the residual stream; y is of promote_types(x.dtype, conv_state.dtype), conv_state's being
    the dtype in which the layer computes. norm_weight: (d_model,); with `norm_bias` (d_model,) the norm is
    LayerNorm, without it RMSNorm. in_proj: (2 d_inner, d_model), the inputs
    first and the gates second. conv_weight: (d_inner, d_conv). conv_bias: (d_inner,). x_proj: (dt_rank + 2
    d_state, d_inner), delta's, B's and C's rows. delta_proj: (d_inner, dt_rank). A_log: (d_inner, d_state);
    D, delta_bias: (d_inner,), all three at least float32. out_proj: (d_model, d_inner). conv_state: (b,
    d_inner, d_conv - 1), oldest first. ssm_state: (b, d_inner, d_state), float32, or float64 when the layer
    computes in it. `out_conv` and `out_ssm` receive the states and may be `conv_state` and `ssm_state`.

    Raises ValueError where a gradient is wanted or shapes disagree.
    """
    return by_parts(
        linear, causal_conv1d, selective_scan,
        x, norm_weight, in_proj, conv_weight, conv_bias, x_proj, delta_proj, A_log, D, delta_bias, out_proj,
        norm_eps=norm_eps, norm_bias=norm_bias, conv_state=conv_state, ssm_state=ssm_state,
        out_conv=out_conv, out_ssm=out_ssm,
    )  # fmt: skip


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
    """`mamba_step` through several layers of one shape: the last y, and the states after this token.

    layers: of each the norm's weight and bias (or None), then in_proj to out_proj as in `mamba_step`.
    out_convs and out_ssms receive the states; they may be conv_states and ssm_states. Layers share no memory.
    """
    return in_turn(
        mamba_step, x, layers, norm_eps=norm_eps, conv_states=conv_states, ssm_states=ssm_states,
        out_convs=out_convs, out_ssms=out_ssms,
    )  # fmt: skip


def in_turn(
    step: Callable[..., tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    layers: Sequence[Layer],
    *,
    norm_eps: float,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
    out_convs: Sequence[Tensor] | None,
    out_ssms: Sequence[Tensor] | None,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """`mamba_steps` by a backend's `mamba_step`."""
    convs: list[Tensor] = []
    ssms: list[Tensor] = []
    none = [None] * len(layers)
    kept = zip(conv_states, ssm_states, out_convs or none, out_ssms or none, strict=True)
    for (weight, bias, *rest), (conv, ssm, out_conv, out_ssm) in zip(layers, kept, strict=True):
        x, conv, ssm = step(
            x, weight, *rest, norm_eps=norm_eps, norm_bias=bias, conv_state=conv, ssm_state=ssm,
            out_conv=out_conv, out_ssm=out_ssm,
        )  # fmt: skip
        convs.append(conv)
        ssms.append(ssm)
    return x, convs, ssms


def by_parts(
    product: Callable[..., Tensor],
    convolve: Callable[..., tuple[Tensor, Tensor]],
    scan: Callable[..., tuple[Tensor, Tensor]],
    *tensors: Tensor,
    norm_eps: float,
    norm_bias: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    out_conv: Tensor | None,
    out_ssm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_step` from a backend's `linear`, `causal_conv1d` and `selective_scan`."""
    check(
        *tensors,
        norm_bias=norm_bias,
        conv_state=conv_state,
        ssm_state=ssm_state,
        out_conv=out_conv,
        out_ssm=out_ssm,
    )
    x, norm_weight, in_proj, conv_weight, conv_bias, x_proj, delta_proj, A_log, D, delta_bias, out_proj = (
        tensors
    )
    dtype, wide = conv_state.dtype, torch.promote_types(x.dtype, torch.float32)
    if norm_bias is None:
        normed = F.rms_norm(x.to(wide), norm_weight.shape, norm_weight.to(wide), norm_eps)
    else:
        normed = F.layer_norm(
            x.to(wide), norm_weight.shape, norm_weight.to(wide), norm_bias.to(wide), norm_eps
        )
    inner, z = product(normed.to(dtype), in_proj).unsqueeze(1).chunk(2, dim=-1)  # (b, 1, d_inner) each
    inner, conv = convolve(inner, conv_weight, conv_bias, initial_state=conv_state, out_state=out_conv)
    n = A_log.shape[1]
    delta, B, C = torch.split(product(inner, x_proj), [delta_proj.shape[1], n, n], dim=-1)
    y, ssm = scan(
        inner, product(delta, delta_proj), -torch.exp(A_log), B, C, D, z, delta_bias,
        initial_state=ssm_state, out_state=out_ssm,
    )  # fmt: skip
    return x + product(y.squeeze(1), out_proj), conv, ssm


def check(
    x: Tensor,
    *weights: Tensor,
    norm_bias: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    out_conv: Tensor | None,
    out_ssm: Tensor | None,
) -> None:
    """Raise ValueError for what `mamba_step` cannot do, naming it."""
    if norm_bias is not None and norm_bias.shape != x.shape[1:]:
        raise ValueError(
            f"mamba_step: norm_bias has shape {tuple(norm_bias.shape)}, expected {tuple(x.shape[1:])}"
        )
    tensors = (x, *weights, conv_state, ssm_state)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("mamba_step has no gradient: call it under torch.no_grad()")
    if x.ndim != 2 or conv_state.ndim != 3 or ssm_state.ndim != 3:
        raise ValueError(
            f"mamba_step: x, conv_state and ssm_state have {x.ndim}, {conv_state.ndim} and {ssm_state.ndim} "
            "dimensions, expected (b, d_model), (b, d_inner, d_conv - 1) and (b, d_inner, d_state)"
        )
    (b, d), (_, inner, k), n = x.shape, conv_state.shape, ssm_state.shape[2]
    rank = weights[_NAMES.index("delta_proj")].shape[-1]
    expected = [
        (d,), (2 * inner, d), (inner, k + 1), (inner,), (rank + 2 * n, inner), (inner, rank), (inner, n),
        (inner,), (inner,), (d, inner), (b, inner, k), (b, inner, n),
    ]  # fmt: skip
    for name, tensor, shape in zip((*_NAMES, "conv_state", "ssm_state"), tensors[1:], expected, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"mamba_step: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    for name, out, state in (("out_conv", out_conv, conv_state), ("out_ssm", out_ssm, ssm_state)):
        if out is not None and (out.shape != state.shape or out.dtype != state.dtype):
            raise ValueError(
                f"mamba_step: {name} is {out.dtype} {tuple(out.shape)}, its state {state.dtype} "
                f"{tuple(state.shape)}: give one like the other"
            )


_NAMES = (
    "norm_weight", "in_proj", "conv_weight", "conv_bias", "x_proj", "delta_proj", "A_log", "D", "delta_bias",
    "out_proj",
)  # fmt: skip
