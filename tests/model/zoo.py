"""Small models for the batteries: one of each layer kind, mixtures, and the tiny presets cut down."""

from ssmoe.config.load import preset, preset_names
from ssmoe.config.model import (
    AttentionConfig,
    DenseConfig,
    ExpertChoiceConfig,
    LayerConfig,
    MambaConfig,
    MambaExpertsConfig,
    ModelConfig,
    MoEConfig,
    MoTConfig,
    ParallelConfig,
    S4DConfig,
)

PATTERNS = {
    "mamba": (MambaConfig(d_state=5),),
    "mamba-wide-conv": (MambaConfig(d_state=3, d_conv=9, expand=1.5, dt_rank=3),),
    "mamba-no-conv": (MambaConfig(d_state=3, d_conv=1),),
    "mamba-learned-state": (MambaConfig(d_state=3, learned_state=True),),
    "s4d": (S4DConfig(d_state=3), DenseConfig(d_ff=24)),
    "s4d-real": (S4DConfig(d_state=5, parametrisation="real", expand=1.5),),
    "attention": (AttentionConfig(num_heads=2), DenseConfig(d_ff=24)),
    "attention-no-rope": (
        AttentionConfig(num_heads=4, rope=False),
        DenseConfig(d_ff=24, activation="swiglu"),
    ),
    "dense": (DenseConfig(d_ff=24, activation="relu_squared"),),
    "moe": (MoEConfig(num_experts=5, d_expert=12),),
    "moe-top2": (MoEConfig(num_experts=4, d_expert=12, top_k=2, activation="swiglu"),),
    "moe-fine": (
        MambaConfig(d_state=3),
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
    "moe-mixtral": (
        MambaConfig(d_state=2),
        MoEConfig(num_experts=4, d_expert=12, top_k=2, normalise_weights=True, balance="none"),
    ),
    "expert-choice": (
        MambaConfig(d_state=3),
        ExpertChoiceConfig(num_experts=3, d_expert=12, granularity=2, mode="token_choice"),
    ),
    "mot": (
        MambaConfig(d_state=2),
        MoTConfig(num_experts=4, d_expert=12, group=8, mode="token_choice", z_coefficient=0.1),
    ),
    "mot-of-one": (MoTConfig(num_experts=3, d_expert=12, group=1),),
    "conv-experts": (MambaExpertsConfig(projections=("conv",), num_experts=3, d_expert=7),),
    "inner-moe": (
        MambaConfig(d_state=3),
        MambaExpertsConfig(num_experts=3, d_expert=7, top_k=2, balance="bias", z_coefficient=0.1),
    ),
    "rom": (
        MambaExpertsConfig(num_experts=4, top_k=2, expert="linear", routing="shared", balance="none"),
        DenseConfig(d_ff=24),
    ),
    "parallel": (ParallelConfig(mamba=MambaConfig(d_state=4), moe=MoEConfig(num_experts=3, d_expert=12)),),
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
    """The presets meant for a CPU that keep the whole contract: no row depends on another."""
    names = [name for name in preset_names() if name.endswith("-tiny")]
    return [name for name in names if preset(name).model.why_no_generation() is None]


def tiny(name: str) -> ModelConfig:
    """A tiny preset's model as it is, but for a smaller vocabulary."""
    return preset(name, ["model.vocab_size=61"]).model


def mixing(name: str) -> ModelConfig:
    """A model of width 16 over 61 tokens whose rows or positions depend on one another."""
    layers: dict[str, tuple[LayerConfig, ...]] = {
        "expert-choice": (
            MambaConfig(d_state=3),
            ExpertChoiceConfig(num_experts=3, d_expert=12, granularity=2),
        ),
        "mot": (MambaConfig(d_state=3), MoTConfig(num_experts=4, d_expert=12, granularity=2, group=2)),
        "mot-masked": (
            AttentionConfig(num_heads=2, causal=False),
            MoTConfig(num_experts=4, d_expert=12, group=4, axis="sequence"),
        ),
    }
    objective = "masked" if name == "mot-masked" else "causal"
    return ModelConfig(vocab_size=61, d_model=16, pattern=layers[name], repeat=2, objective=objective)


MIXING = ("expert-choice", "mot", "mot-masked")
