"""What a model is: a pattern of residual sub-layers, repeated, between an embedding and a head.

One frozen class a layer kind, told apart by `kind`. No tensors here: `ssmoe.model.build` turns a
`ModelConfig` into modules and `ssmoe.config.count` into numbers.
"""

from math import ceil
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Activation = Literal["relu", "relu_squared", "swiglu"]
Score = Literal["softmax", "sigmoid"]
Balance = Literal["auxiliary", "bias", "none"]
BiasUpdate = Literal["sign", "error"]


class Frozen(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class MambaConfig(Frozen):
    """A selective state space mixer (Mamba, arXiv 2312.00752, section 3.4)."""

    kind: Literal["mamba"] = "mamba"
    d_state: PositiveInt = 16
    """State width N of each channel."""
    d_conv: PositiveInt = 4
    """Taps of the causal convolution."""
    expand: PositiveFloat = 2.0
    """d_inner = expand * d_model; fractions as in table 2 of arXiv 2401.04081 are rounded to an integer."""
    dt_rank: PositiveInt | Literal["auto"] = "auto"
    """Rank of the delta projection; "auto" is ceil(d_model / 16)."""
    dt_min: PositiveFloat = 1e-3
    dt_max: PositiveFloat = 1e-1
    """The initial step sizes are log-uniform in [dt_min, dt_max]."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} is above dt_max={self.dt_max}: swap them")
        return self

    def d_inner(self, d_model: int) -> int:
        """Channels inside the mixer."""
        return max(1, round(self.expand * d_model))

    def rank(self, d_model: int) -> int:
        """`dt_rank` with "auto" resolved."""
        return ceil(d_model / 16) if self.dt_rank == "auto" else self.dt_rank


class AttentionConfig(Frozen):
    """Causal multi-head self-attention."""

    kind: Literal["attention"] = "attention"
    num_heads: PositiveInt
    rope: bool = True
    """Rotary position embedding (arXiv 2104.09864); without it the layer sees no positions."""
    rope_base: PositiveFloat = 10_000.0


class DenseConfig(Frozen):
    """A position-wise feed-forward layer, without biases."""

    kind: Literal["dense"] = "dense"
    d_ff: PositiveInt
    activation: Activation = "relu"


class RoutingConfig(Frozen):
    """How a router scores tokens, weighs the chosen experts and keeps their load even."""

    score: Score = "softmax"
    """Switch and Mixtral score by softmax over the experts, DeepSeek-V3 (arXiv 2412.19437) by sigmoid."""
    normalise_weights: bool = False
    """Divide the chosen experts' scores by their sum: with softmax, Mixtral's softmax over the chosen
    (arXiv 2401.04088); with sigmoid, DeepSeek-V3's gate. False is Switch: the score itself."""
    weight_scale: PositiveFloat = 1.0
    """Factor on every weight (DeepSeek-V3's routed scaling factor)."""
    balance: Balance = "auxiliary"
    """"auxiliary": the loss of `balance_coefficient`. "bias": loss-free (arXiv 2408.15664), a number for each
    expert that is added to its score when experts are chosen, never to a weight, and moves once an optimiser
    step against the load of the whole step."""
    balance_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss E * sum_e f_e P_e (arXiv 2101.03961, equation 4)."""
    bias_update: BiasUpdate = "sign"
    """The bias moves by bias_rate times sign(mean load - load), or times (mean load - load) / mean load."""
    bias_rate: PositiveFloat = 1e-3
    z_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the router z-loss, the mean squared log-partition of the router (arXiv 2202.08906)."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training the router's input is multiplied by noise uniform in [1 - jitter, 1 + jitter]
    (arXiv 2101.03961, appendix C); 0 is none."""

    def _check_choices(self, num_choices: int) -> None:
        if self.normalise_weights and num_choices == 1:
            raise ValueError(
                "normalise_weights=true with one expert a token makes every weight 1, from which the router "
                "learns nothing: set normalise_weights=false or raise top_k or granularity"
            )


class MoEConfig(RoutingConfig):
    """A token-choice mixture of experts (Switch for top_k = 1, arXiv 2101.03961).

    With granularity G it is fine-grained (arXiv 2402.07871): num_experts * G experts of d_expert / G, of
    which a token takes top_k * G, so that sizes and FLOPs, the router's aside, do not depend on G.
    """

    kind: Literal["moe"] = "moe"
    num_experts: PositiveInt
    d_expert: PositiveInt
    top_k: PositiveInt = 1
    granularity: PositiveInt = 1
    num_shared_experts: NonNegativeInt = 0
    """Experts of d_expert / granularity that every token takes (arXiv 2401.06066), with weight 1."""
    activation: Activation = "relu"
    output_norm: bool = False
    """A LayerNorm on the routed experts' sum, as arXiv 2402.07871 has it for G > 1."""
    capacity_factor: PositiveFloat | None = None
    """In training an expert takes at most floor(capacity_factor * top_k * tokens / num_experts) tokens;
    None is dropless. Evaluation is always dropless."""

    @property
    def bank(self) -> tuple[int, int, int]:
        """Experts in the bank, the width of one, and how many a token takes."""
        return split_experts(self.num_experts, self.d_expert, self.top_k, self.granularity)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_choices(self.bank[2])
        return self


def split_experts(num_experts: int, d_expert: int, top_k: int, granularity: int) -> tuple[int, int, int]:
    """num_experts * G, d_expert / G and top_k * G. Raises ValueError where that is not possible."""
    if top_k > num_experts:
        raise ValueError(
            f"top_k={top_k} is more than num_experts={num_experts}: "
            f"lower top_k to at most {num_experts} or add experts"
        )
    if d_expert % granularity:
        lower = d_expert - d_expert % granularity
        raise ValueError(
            f"granularity={granularity} does not divide d_expert={d_expert}: "
            f"use d_expert={lower or granularity} or {lower + granularity}"
        )
    return num_experts * granularity, d_expert // granularity, top_k * granularity


LayerConfig = Annotated[MambaConfig | AttentionConfig | DenseConfig | MoEConfig, Field(discriminator="kind")]


class InitConfig(Frozen):
    """Which initialisation table applies (`ssmoe.model.init`)."""

    scheme: Literal["moe_mamba", "mamba"] = "mamba"
    """"moe_mamba": the truncated normals of the MoE-Mamba authors' code; "mamba": that of mamba-ssm."""
    scale: PositiveFloat = 0.1
    """Scheme "moe_mamba": std = sqrt(scale / fan_in)."""
    expert_fan_in: Literal["bank", "expert"] = "bank"
    """Fan-in of the experts' second matrix in scheme "moe_mamba": the authors' num_experts * d_expert, or
    d_expert alone."""


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
        if self.tied_embeddings and self.head_bias:
            raise ValueError("head_bias=true needs tied_embeddings=false: a tied head has no bias of its own")
        return self


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
