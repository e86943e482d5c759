"""A scaling law as a value: named coefficients, where they come from and where they hold.

    L(N, D, G) = c + (g / G^gamma + a) / N^alpha + b / D^beta        (arXiv 2402.07871, equation 7)

N parameters, D tokens, G granularity; a law without granularity has g = 0.
"""

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError

from ssmoe.config.model import Frozen
from ssmoe.scaling.cost import Blocks, Cost, block_cost


class Coefficients(Frozen):
    """The law's numbers, under the paper's names."""

    a: PositiveFloat
    alpha: PositiveFloat
    b: PositiveFloat
    beta: PositiveFloat
    g: NonNegativeFloat = 0.0
    gamma: NonNegativeFloat = 0.0
    c: NonNegativeFloat


class Range(Frozen):
    """Where the runs behind a law lay; outside it the law extrapolates."""

    model_config = ConfigDict(ser_json_inf_nan="strings", allow_inf_nan=True)

    parameters: tuple[float, float]
    """In the law's own count N."""
    tokens: tuple[float, float] = (0.0, float("inf"))
    """Unbounded where not known."""
    granularity: tuple[int, int] = (1, 1)


class Law(Frozen):
    """A fitted law, the blocks it was fitted on and its uncertainty."""

    # an interval or a range may be open, which the file writes as a word
    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    name: str
    source: str
    blocks: Blocks
    expansion: PositiveFloat = 1.0
    """E, the parameters of the experts over those of one feed-forward layer."""
    size: Literal["total", "active"] = "total"
    """Which parameters N counts."""
    coefficients: Coefficients
    valid: Range
    rmse: float | None = None
    """Of the fit, in nats."""
    held_out_rmse: float | None = None
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """95 % intervals of fitted coefficients; the papers publish none."""
    note: str = ""

    @property
    def cost(self) -> Cost:
        """What a block costs."""
        return block_cost(self.blocks, self.expansion)

    @property
    def granularities(self) -> tuple[int, ...]:
        """The powers of two worth trying; only 1 where the law has no granularity."""
        return tuple(2**i for i in range(11)) if self.coefficients.g > 0 else (1,)


def loss(law: Law, parameters: float, tokens: float, granularity: float = 1) -> float:
    """L(N, D, G)."""
    k = law.coefficients
    return k.c + size_term(law, granularity) / parameters**k.alpha + k.b / tokens**k.beta


def size_term(law: Law, granularity: float) -> float:
    """g / G^gamma + a, what multiplies 1 / N^alpha."""
    k = law.coefficients
    return k.g / granularity**k.gamma + k.a


def tokens_for_loss(law: Law, target: float, parameters: float, granularity: float = 1) -> float:
    """The tokens D after which a model of N parameters reaches a loss; infinite where no number does."""
    k = law.coefficients
    left = target - k.c - size_term(law, granularity) / parameters**k.alpha
    return (k.b / left) ** (1 / k.beta) if left > 0 else float("inf")


def parameters(law: Law, d_model: float, num_blocks: float, granularity: float = 1) -> float:
    """N as the law counts it."""
    terms = law.cost.total if law.size == "total" else law.cost.active
    return terms.at(d_model, num_blocks, granularity)


def token_flops(law: Law, d_model: float, num_blocks: float, granularity: float = 1) -> float:
    """Training FLOPs a token."""
    return law.cost.flops.at(d_model, num_blocks, granularity)


def extrapolations(law: Law, parameters: float, tokens: float, granularity: int) -> list[str]:
    """One phrase for each of N, D and G that lies outside the law's range."""
    phrases: list[str] = []
    for name, value, (low, high) in (
        ("N", parameters, law.valid.parameters),
        ("D", tokens, law.valid.tokens),
        ("G", float(granularity), law.valid.granularity),
    ):
        # the ranges are printed to three digits
        if value > high * 1.005:
            phrases.append(f"{name} = {value:.3g} is {value / high:.3g} times the largest fitted, {high:.3g}")
        elif value < low * 0.995:
            phrases.append(
                f"{name} = {value:.3g} is {low / value:.3g} times below the smallest fitted, {low:.3g}"
            )
    return phrases


def save(law: Law, path: Path) -> None:
    """Write a law as JSON."""
    path.write_text(law.model_dump_json(indent=2) + "\n")


def load(path: Path) -> Law:
    """Read a law that `save` wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"no such law file: {path}; `ssmoe fit ... --output {path}` writes one")
    try:
        return Law.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise ValueError(f"{path} is not a law: {where}: {first['msg']}") from error
