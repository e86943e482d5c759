"""The GPU backend: kernels compiled when first used, from Triton, with no CUDA build."""

from ssmoe.ops.reference.linear import linear
from ssmoe.ops.triton.norm import norm
from ssmoe.ops.triton.causal_conv1d import causal_conv1d
from ssmoe.ops.triton.expert_linear import expert_linear
from ssmoe.ops.triton.expert_mlp import expert_mlp
from ssmoe.ops.triton.head_cross_entropy import head_cross_entropy
from ssmoe.ops.triton.selective_scan import selective_scan

__all__ = [
    "causal_conv1d",
    "expert_linear",
    "expert_mlp",
    "head_cross_entropy",
    "linear",
    "norm",
    "selective_scan",
]
