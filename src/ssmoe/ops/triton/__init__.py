"""The GPU backend: kernels compiled when first used, from Triton or by NVRTC, with no CUDA build."""

from ssmoe.ops.triton.adamw_step import adamw_step
from ssmoe.ops.triton.argmax import argmax
from ssmoe.ops.triton.attention_step import attention_step
from ssmoe.ops.triton.causal_conv1d import causal_conv1d
from ssmoe.ops.triton.embedding import embedding
from ssmoe.ops.triton.expert_linear import expert_linear
from ssmoe.ops.triton.expert_mlp import expert_mlp
from ssmoe.ops.triton.head_cross_entropy import head_cross_entropy
from ssmoe.ops.triton.linear import linear
from ssmoe.ops.triton.mamba_step import mamba_step, mamba_steps
from ssmoe.ops.triton.moe_step import moe_step
from ssmoe.ops.triton.muon_step import muon_step
from ssmoe.ops.triton.residual_norm import residual_norm
from ssmoe.ops.triton.residual_sum import residual_sum
from ssmoe.ops.triton.route import route
from ssmoe.ops.triton.selective_scan import selective_scan
from ssmoe.ops.triton.split_linear import fork_linear, split_linear
from ssmoe.ops.triton.wide_linear import fork_wide, wide_linear

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
