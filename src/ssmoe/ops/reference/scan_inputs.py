"""What a Mamba mixer's scan reads: the convolution's output and, projected from it, delta, B and C."""

from torch import Tensor

from ssmoe.ops.reference.causal_conv1d import causal_conv1d
from ssmoe.ops.reference.linear import linear
from ssmoe.ops.segments import Segments


def scan_inputs(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    delta_proj: Tensor,
    *,
    initial_state: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x, delta, B, C, final state): `causal_conv1d` and two products of its output.

    x, delta: (b, l, d). conv_weight: (d, k). x_proj: (r + 2 n, d). delta_proj: (d, r). B, C: (b, l, n).
    State: (b, d, k - 1). Section 3.2 of arXiv 2312.00752: delta = (x W_x)_{:r} W_delta.
    """
    x, state = causal_conv1d(x, conv_weight, conv_bias, initial_state=initial_state, segments=segments)
    rank = delta_proj.shape[1]
    n = (x_proj.shape[0] - rank) // 2
    low, B, C = linear(x, x_proj).split([rank, n, n], dim=-1)
    return x, linear(low, delta_proj), B, C, state
