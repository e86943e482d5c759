"""Small models for the batteries: one of each layer kind, mixtures, and the tiny presets cut down."""

from ssmoe.config.load import preset, preset_names
from ssmoe.config.model import AttentionConfig, DenseConfig, MambaConfig, ModelConfig, MoEConfig

PATTERNS = {
    "mamba": (MambaConfig(d_state=5),),
    "mamba-wide-conv": (MambaConfig(d_state=3, d_conv=9, expand=1.5, dt_rank=3),),
    "mamba-no-conv": (MambaConfig(d_state=3, d_conv=1),),
    "attention": (AttentionConfig(num_heads=2), DenseConfig(d_ff=24)),
    "attention-no-rope": (
        AttentionConfig(num_heads=4, rope=False),
        DenseConfig(d_ff=24, activation="swiglu"),
    ),
    "dense": (DenseConfig(d_ff=24, activation="relu_squared"),),
    "moe": (MoEConfig(num_experts=5, d_expert=12),),
    "moe-top2": (MoEConfig(num_experts=4, d_expert=12, top_k=2, activation="swiglu"),),
    "moe-fine": (
        MoEConfig(
            num_experts=3,
            d_expert=16,
            granularity=4,
            num_shared_experts=1,
            score="sigmoid",
            normalise_weights=True,
            weight_scale=2.5,
            balance="bias",
            output_norm=True,
            activation="swiglu",
        ),
    ),
    "moe-mixtral": (MoEConfig(num_experts=4, d_expert=12, top_k=2, normalise_weights=True, balance="none"),),
    "moe-mamba": (MambaConfig(d_state=4), MoEConfig(num_experts=4, d_expert=20, capacity_factor=1.0)),
    "hybrid": (
        MambaConfig(d_state=4),
        MoEConfig(num_experts=3, d_expert=16),
        AttentionConfig(num_heads=2),
        DenseConfig(d_ff=24),
    ),
}


def small(name: str, *, repeat: int = 2, **changes: object) -> ModelConfig:
    """A pattern as a model of width 16 over 61 tokens."""
    return ModelConfig.model_validate(
        {"vocab_size": 61, "d_model": 16, "pattern": PATTERNS[name], "repeat": repeat, **changes}
    )


def tiny_presets() -> list[str]:
    """The presets meant for a CPU."""
    return [name for name in preset_names() if name.endswith("-tiny")]


def tiny(name: str) -> ModelConfig:
    """A tiny preset's model as it is, but for a smaller vocabulary."""
    return preset(name, ["model.vocab_size=61"]).model
