"""The definitions: slow, obvious, on any device, differentiable in every floating input."""

from ssmoe.ops.reference.adamw_step import adamw_step
from ssmoe.ops.reference.argmax import argmax
from ssmoe.ops.reference.attention_step import attention_step
from ssmoe.ops.reference.causal_conv1d import causal_conv1d
from ssmoe.ops.reference.embedding import embedding
from ssmoe.ops.reference.expert_linear import expert_linear
from ssmoe.ops.reference.expert_mlp import expert_mlp
from ssmoe.ops.reference.head_cross_entropy import head_cross_entropy
from ssmoe.ops.reference.linear import linear
from ssmoe.ops.reference.mamba_step import mamba_step, mamba_steps
from ssmoe.ops.reference.moe_step import moe_step
from ssmoe.ops.reference.muon_step import muon_step
from ssmoe.ops.reference.residual_norm import residual_norm
from ssmoe.ops.reference.residual_sum import residual_sum
from ssmoe.ops.reference.route import route
from ssmoe.ops.reference.selective_scan import selective_scan
from ssmoe.ops.reference.split_linear import fork_linear, split_linear
from ssmoe.ops.reference.wide_linear import fork_wide, wide_linear

__all__ = [
    "adamw_step",
    "argmax",
    "attention_step",
    "causal_conv1d",
    "embedding",
    "expert_linear",
    "expert_mlp",
    "fork_linear",
    "fork_wide",
    "head_cross_entropy",
    "linear",
    "mamba_step",
    "mamba_steps",
    "moe_step",
    "muon_step",
    "residual_norm",
    "residual_sum",
    "route",
    "selective_scan",
    "split_linear",
    "wide_linear",
]
