"""What a model is: a pattern of residual sub-layers, repeated, between an embedding and a head.

`ssmoe.config.layers` has one class a layer kind; their names are here too. No tensors: `ssmoe.model.build`
turns a `ModelConfig` into modules and `ssmoe.config.count` into numbers.
"""

from math import lcm
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ssmoe.config.layers import (
    Activation,
    AttentionConfig,
    Balance,
    BiasUpdate,
    DenseConfig,
    ExpertChoiceConfig,
    Frozen,
    LayerConfig,
    MambaConfig,
    MambaExpertsConfig,
    MoEConfig,
    MoTConfig,
    ParallelConfig,
    Projection,
    RoutingConfig,
    S4DConfig,
    Score,
    split_experts,
)

__all__ = [
    "Activation",
    "AttentionConfig",
    "Balance",
    "BiasUpdate",
    "DenseConfig",
    "ExpertChoiceConfig",
    "Frozen",
    "InitConfig",
    "LayerConfig",
    "MambaConfig",
    "MambaExpertsConfig",
    "MoEConfig",
    "MoTConfig",
    "ModelConfig",
    "ParallelConfig",
    "Projection",
    "RoutingConfig",
    "S4DConfig",
    "Score",
    "split_experts",
]


class InitConfig(Frozen):
    """Which initialisation table applies (`ssmoe.model.init`)."""

    scheme: Literal["moe_mamba", "mamba"] = "mamba"
    """"moe_mamba": the truncated normals of the MoE-Mamba authors' code; "mamba": that of mamba-ssm."""
    scale: PositiveFloat = 0.1
    """Scheme "moe_mamba": std = sqrt(scale / fan_in)."""
    expert_fan_in: Literal["bank", "expert"] = "bank"
    """Fan-in of the experts' second matrix in scheme "moe_mamba": the authors' num_experts * d_expert, or
    d_expert alone."""
    expert_up_factor: PositiveFloat = 1.0
    """On the standard deviation that the scheme gives to the experts' first matrices, up and gate."""
    expert_down_factor: PositiveFloat = 1.0
    """On that of their second matrices. 1 / sqrt(k) with expert_fan_in = "expert" is the fan-in of the k
    experts that are added up."""
    router_factor: PositiveFloat = 1.0
    """On that of the router's weights: a small one begins with even scores."""


class ModelConfig(Frozen):
    """A language model: `repeat` times `pattern`, each layer pre-normed and added to the residual stream."""

    vocab_size: PositiveInt
    d_model: PositiveInt
    pattern: tuple[LayerConfig, ...] = Field(min_length=1)
    repeat: PositiveInt = 1
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: PositiveFloat = 1e-5
    final_norm: bool = True
    tied_embeddings: bool = True
    """The head shares the embedding's matrix."""
    head_bias: bool = False
    residual_float32: bool = True
    """Keep the residual stream in float32 whatever the compute dtype."""
    objective: Literal["causal", "masked"] = "causal"
    """"masked" hides `data.mask_fraction` of the tokens behind the last id of the vocabulary, which the
    tokenizer must not use, and predicts them."""
    init: InitConfig = InitConfig()

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """Every sub-layer in order."""
        return self.pattern * self.repeat

    @model_validator(mode="after")
    def _check(self) -> Self:
        for layer in self.pattern:
            if isinstance(layer, AttentionConfig):
                _check_heads(layer, self.d_model)
                if not layer.causal and self.objective == "causal":
                    raise ValueError('causal=false sees the tokens to predict: set objective="masked"')
            if isinstance(layer, MoTConfig) and layer.axis == "sequence" and self.objective == "causal":
                raise ValueError(
                    'axis="sequence" mixes a token with later ones: use axis="batch" or objective="masked"'
                )
        if self.tied_embeddings and self.head_bias:
            raise ValueError("head_bias=true needs tied_embeddings=false: a tied head has no bias of its own")
        return self

    @property
    def row_multiple(self) -> int:
        """Rows of a forward pass must be a multiple of this, because groups of them are mixed."""
        mixing = [layer for layer in self.pattern if isinstance(layer, MoTConfig) and layer.mixes]
        return lcm(1, *(layer.group for layer in mixing if layer.axis == "batch"))

    @property
    def length_multiple(self) -> int:
        """The length of a forward pass must be a multiple of this."""
        mixing = [layer for layer in self.pattern if isinstance(layer, MoTConfig) and layer.mixes]
        return lcm(1, *(layer.group for layer in mixing if layer.axis == "sequence"))

    def why_no_generation(self) -> str | None:
        """What keeps the model from generating text, and the remedy; None if nothing does."""
        if self.objective == "masked":
            return 'objective="masked" fills in hidden tokens and continues no text: train with "causal"'
        for layer in self.pattern:
            mixes = isinstance(layer, MoTConfig) and layer.mixes
            chosen = isinstance(layer, ExpertChoiceConfig) and layer.mode == "expert_choice"
            if mixes or chosen:
                return (
                    f"the output of {layer.kind} depends on the other rows of the batch: train on as "
                    f"token choice with the same weights, `ssmoe train RUN/config.json train.init_from=RUN "
                    f"model.pattern.{layer.kind}.mode=token_choice name=NEW`, and generate from that run"
                )
        return None


def _check_heads(layer: AttentionConfig, d_model: int) -> None:
    if d_model % layer.num_heads:
        valid = [n for n in range(1, d_model + 1) if d_model % n == 0]
        nearest = min(valid, key=lambda n: abs(n - layer.num_heads))
        raise ValueError(
            f"num_heads={layer.num_heads} does not divide d_model={d_model}: use num_heads={nearest}"
        )
    if layer.rope and (d_model // layer.num_heads) % 2:
        raise ValueError(
            f"rope needs an even head width, but d_model / num_heads = {d_model // layer.num_heads}: "
            "change num_heads or set rope=false"
        )
