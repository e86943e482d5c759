"""The layers that a model may be made of: one frozen class a kind, told apart by `kind`; no tensors."""

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
Projection = Literal["conv", "gate", "out"]


class Frozen(BaseModel):
    """Base of every configuration: immutable, every number finite, and an unknown key is an error."""

    # JSON has no infinity: a run that was begun with one could not be read again
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


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
    learned_state: bool = False
    """Every document begins from a learned scan state, zero at first, instead of zeros. Documents that begin
    inside a packed row then cost as much again as a scan of the reference."""

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


class S4DConfig(Frozen):
    """The time-invariant diagonal state space S4D (arXiv 2206.11893) in Mamba's block, without selection."""

    kind: Literal["s4d"] = "s4d"
    d_state: PositiveInt = 16
    """States of a channel; a complex one stands for itself and its conjugate."""
    parametrisation: Literal["real", "complex"] = "complex"
    """S4D-Real, A_n = -(n + 1), or S4D-Lin, A_n = -1/2 + i pi n."""
    d_conv: PositiveInt = 4
    """Taps of the causal convolution in front."""
    expand: PositiveFloat = 2.0
    dt_min: PositiveFloat = 1e-3
    dt_max: PositiveFloat = 1e-1
    """The initial step sizes are log-uniform in [dt_min, dt_max]."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} is above dt_max={self.dt_max}: swap them")
        return self

    @property
    def complex(self) -> bool:
        """Whether the states are complex."""
        return self.parametrisation == "complex"

    def d_inner(self, d_model: int) -> int:
        """Channels inside the mixer."""
        return max(1, round(self.expand * d_model))


class AttentionConfig(Frozen):
    """Multi-head self-attention."""

    kind: Literal["attention"] = "attention"
    num_heads: PositiveInt
    rope: bool = True
    """Rotary position embedding (arXiv 2104.09864); without it the layer sees no positions."""
    rope_base: PositiveFloat = 10_000.0
    causal: bool = True
    """False looks both ways, for objective = "masked" only, and keeps no state."""


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


class MambaExpertsConfig(RoutingConfig):
    """Experts inside the Mamba block: MoE instead of some of its projections (arXiv 2401.04081, section 5.2).

    The defaults are that paper's: a two-layer ReLU network of hidden width 352 for each expert, and a router
    for each projection. RoM (arXiv 2506.18145) is expert = "linear" and routing = "shared": one decision,
    made on the block's input, for all projections. Either routing takes either expert.
    """

    kind: Literal["mamba_experts"] = "mamba_experts"
    projections: tuple[Literal["conv", "gate", "out"], ...] = Field(
        default=("conv", "gate", "out"), min_length=1
    )
    """conv: what goes into convolution and scan. gate: what multiplies their result. out: back to d_model."""
    num_experts: PositiveInt
    """For each projection."""
    top_k: PositiveInt = 1
    expert: Literal["network", "linear"] = "network"
    d_expert: PositiveInt = 352
    """Hidden width of a "network"."""
    activation: Literal["relu", "relu_squared"] = "relu"
    routing: Literal["separate", "shared"] = "separate"
    mamba: MambaConfig = MambaConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        split_experts(self.num_experts, self.d_expert, self.top_k, 1)
        self._check_choices(self.top_k)
        if len(set(self.projections)) < len(self.projections):
            raise ValueError(f"projections={self.projections} names one twice: name each once")
        return self


class ParallelConfig(Frozen):
    """Mamba(LN(x)) + MoE(LN(x)), side by side after one norm (arXiv 2401.04081, section 5.1)."""

    kind: Literal["parallel"] = "parallel"
    mamba: MambaConfig = MambaConfig()
    moe: MoEConfig


class ExpertChoiceConfig(RoutingConfig):
    """Experts choose tokens (arXiv 2202.09368), among those of all rows at one position (arXiv 2402.07871).

    Of a group of n tokens each expert takes the floor(n * top_k / num_experts) with the largest scores, at
    least one: the load is even by construction. Sizes as in `MoEConfig`. What a token gets depends on the
    other rows, so that generation needs mode = "token_choice", with the same weights and some more training.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    num_experts: PositiveInt
    d_expert: PositiveInt
    top_k: PositiveInt = 1
    """Experts that take a token, on average."""
    granularity: PositiveInt = 1
    activation: Activation = "relu"
    output_norm: bool = False
    """A LayerNorm on the experts' sum, "crucial for G > 1" (arXiv 2402.07871)."""
    group: Literal["position", "batch"] = "position"
    """"position" never shows a token its own future; "batch", all tokens together, does."""
    allow_noncausal_routing: bool = False
    """group = "batch" leaks later tokens into the choice, and is refused without this."""
    mode: Literal["expert_choice", "token_choice"] = "expert_choice"

    @property
    def bank(self) -> tuple[int, int, int]:
        """Experts in the bank, the width of one, and how many take a token on average."""
        return split_experts(self.num_experts, self.d_expert, self.top_k, self.granularity)

    @model_validator(mode="after")
    def _check(self) -> Self:
        num_choices = self.bank[2]
        self._check_choices(num_choices if self.mode == "token_choice" else 2)
        if self.group == "batch" and not self.allow_noncausal_routing:
            raise ValueError(
                'group="batch" lets the choice for a token depend on later ones: use group="position", '
                "or set allow_noncausal_routing=true to accept that"
            )
        return self


class MoTConfig(RoutingConfig):
    """Mixture of Tokens (arXiv 2310.15961): experts work on mixtures of a group's tokens, not on tokens.

    For expert e and a group of tokens x_i: w_ie = softmax over i of (W x_i)_e / temperature; the expert gets
    sum_i w_ie x_i, and what it returns goes back to token i times w_ie. Sizes as in `MoEConfig`; granularity
    is the paper's "/k", more and smaller mixtures. The routing options apply in mode "token_choice", top-k
    routing with the same weights, in which a trained mixture is trained on so that it can generate.
    """

    kind: Literal["mot"] = "mot"
    num_experts: PositiveInt
    d_expert: PositiveInt
    top_k: PositiveInt = 1
    granularity: PositiveInt = 1
    activation: Activation = "relu"
    group: PositiveInt = 32
    """Tokens mixed together. FLOPs equal those of one expert a token where group = num_experts; group = 1
    gives every token to every expert with weight 1."""
    axis: Literal["batch", "sequence"] = "batch"
    """"batch": a group is `group` rows at the same position. "sequence": `group` neighbours in a row, for
    objective = "masked" only."""
    temperature: PositiveFloat = 1.0
    mode: Literal["mixture", "token_choice"] = "mixture"

    @property
    def bank(self) -> tuple[int, int, int]:
        """Experts in the bank, the width of one, and how many a token takes in token choice."""
        return split_experts(self.num_experts, self.d_expert, self.top_k, self.granularity)

    @property
    def mixes(self) -> bool:
        """Whether tokens are mixed with others."""
        return self.mode == "mixture" and self.group > 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        num_choices = self.bank[2]
        self._check_choices(num_choices if self.mode == "token_choice" else 2)
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


LayerConfig = Annotated[
    MambaConfig
    | S4DConfig
    | AttentionConfig
    | DenseConfig
    | MoEConfig
    | ExpertChoiceConfig
    | MoTConfig
    | MambaExpertsConfig
    | ParallelConfig,
    Field(discriminator="kind"),
]
