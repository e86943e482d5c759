"""How a run is trained: optimiser, schedule, precision, cadence."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ssmoe.config.model import Frozen


class LearningRateRatios(Frozen):
    """Factors on the learning rate, by what a parameter is; weight decay follows, as in AdamW.

    A model without such parameters is trained as if the factor were not there, so that the two sides of a
    comparison can have the same settings. A tied head is the embedding.
    """

    experts: PositiveFloat = 1.0
    """Banks of experts."""
    router: PositiveFloat = 1.0
    embedding: PositiveFloat = 1.0
    head: PositiveFloat = 1.0
    matrices: PositiveFloat = 1.0
    """Other projections, shared experts included."""
    other: PositiveFloat = 1.0
    """Norms, biases, convolutions, A, C, D, the delta bias and learned states."""


class TrainConfig(Frozen):
    """The training side of a run. A step is one optimiser step."""

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 16
    """Rows a step."""
    micro_batch_size: PositiveInt | None = None
    """Rows a forward pass; must divide batch_size. None is the whole batch. Gradients are accumulated."""
    tbptt: PositiveInt | None = None
    """Truncated back-propagation through time: a step reads this many consecutive windows of data.context
    tokens a row, gradients go through all of them, and the next step goes on from the state of this one, so
    that a document is read as a whole however long it is. Attention keeps all tokens of its
    document. None starts every row from the zero state."""
    recompute: bool = False
    """Keep of every layer only its input for the backward pass and compute the rest again there: much less
    memory for one more forward pass."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" (arXiv 2502.16982): orthogonalised momentum for the projections and every expert's matrices,
    AdamW for the rest, the router included. Learning rate and weight decay mean the same in both."""
    cuda_graph: bool = True
    """On a GPU, record the launches of one step and replay them from then on, which spares the host; the
    values are the same. A recorded step keeps its memory between steps, beside that of an evaluation. Where a
    step cannot be recorded (train.tbptt, layers that wait for the host) a message says why."""
    learning_rate: PositiveFloat = 1e-3
    """Peak, reached after the warm-up."""
    learning_rate_ratios: LearningRateRatios = LearningRateRatios()
    warmup_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """The way down after the warm-up. "wsd" stays at the peak and falls at the end, as one minus the square
    root of the progress (arXiv 2405.18392); "constant" stays there."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps after the warm-up in which schedule = "wsd" falls."""
    final_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """The schedule ends at this fraction of the peak; "constant" does not fall."""
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices only; never on norms, biases, A_log, D or the delta bias."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_eps: PositiveFloat = 1e-8
    muon_momentum: float = Field(default=0.95, gt=0, lt=1)
    """With optimizer = "muon": the decay of the gradients' mean, used as Nesterov does."""
    muon_experts: bool = True
    """False leaves the experts' matrices to AdamW."""
    muon_expert_momentum: float | None = Field(default=None, gt=0, lt=1)
    """Of the experts' matrices, each of which sees few of a step's tokens; None is muon_momentum."""
    muon_iteration: Literal["polar", "jordan"] = "polar"
    """How matrices are orthogonalised: in four passes with coefficients after arXiv 2505.16932 and a close
    bound on the largest singular value, or in Jordan's five, as torch.optim.Muon does it."""
    clip_norm: PositiveFloat = 0.5
    """Gradients are scaled down to at most this global norm."""
    average: float = Field(default=0.0, ge=0, le=0.5)
    """Evaluate, and keep as the checkpoint's weights, a running average of the weights whose mean age is this
    share of the steps so far (arXiv 2312.02696); 0 is the last weights themselves. Training goes on from the
    last weights either way."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Parameters, optimiser and recurrent state are float32 in both."""
    seed: int = 0
    """Initial weights."""
    init_from: str | None = None
    """A run or checkpoint folder whose weights are the initial ones; names and shapes must be equal. The
    optimiser, the schedule and the data begin anew."""
    device: str = "auto"
    """"auto" is cuda where present, else cpu."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads while training, at most 1,024; None is torch's choice, as many as cores. Small models gain
    little from a second one, and lose much when another process holds its core."""
    backend: str = "auto"
    """Kernels: "auto" or a name that `ssmoe doctor` lists."""
    eval_every: PositiveInt = 100
    """Steps between held-out evaluations; there is always one after the last step."""
    eval_rows: NonNegativeInt = 64
    """Held-out rows an evaluation; 0 is all of them."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints; there is always one after the last step."""
    keep_checkpoints: NonNegativeInt = 2
    """Older checkpoints are removed. 0 writes none at all: such a run leaves its metrics and no model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            valid = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            nearest = min(valid, key=lambda n: abs(n - micro))
            raise ValueError(
                f"micro_batch_size={micro} does not divide batch_size={self.batch_size}: "
                f"use micro_batch_size={nearest}"
            )
        return self
