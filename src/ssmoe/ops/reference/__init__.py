"""The definitions: slow, obvious, on any device, differentiable in every floating input."""

from ssmoe.ops.reference.causal_conv1d import causal_conv1d
from ssmoe.ops.reference.expert_linear import expert_linear
from ssmoe.ops.reference.expert_mlp import expert_mlp
from ssmoe.ops.reference.head_cross_entropy import head_cross_entropy
from ssmoe.ops.reference.linear import linear
from ssmoe.ops.reference.mamba_step import mamba_step, mamba_steps
from ssmoe.ops.reference.residual_norm import residual_norm
from ssmoe.ops.reference.selective_scan import selective_scan

__all__ = [
    "causal_conv1d",
    "expert_linear",
    "expert_mlp",
    "head_cross_entropy",
    "linear",
    "mamba_step",
    "mamba_steps",
    "residual_norm",
    "selective_scan",
]
