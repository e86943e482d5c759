"""A mixture of experts as later models have it, for the 25 M preset: the benchmark of a step and its test."""

LATER = [
    f"model.pattern.moe.{change}"
    for change in (
        "num_experts=42",
        "d_expert=1024",
        "granularity=8",
        "capacity_factor=null",
        "num_shared_experts=1",
        "activation=swiglu",
        "score=sigmoid",
        "normalise_weights=true",
        "balance=bias",
    )
]
"""336 SwiGLU experts, top-8, one shared, loss-free balancing."""
