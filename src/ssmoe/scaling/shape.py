"""Configurations in this project's terms: a kind of block, a width, a depth, E and G to a ModelConfig."""

from math import lcm
from typing import NamedTuple

from ssmoe.config.count import count_parameters, training_flops
from ssmoe.config.model import AttentionConfig, DenseConfig, LayerConfig, MambaConfig, ModelConfig, MoEConfig
from ssmoe.scaling.cost import Blocks
from ssmoe.scaling.law import Law, parameters, token_flops

TILE = 16
"""Expert widths are multiples of this, as tensor cores take them."""
WIDTH_STEP = 64


class Shape(NamedTuple):
    """What a law needs to know of a model, in whole numbers."""

    d_model: int
    num_blocks: int
    granularity: int


class Counts(NamedTuple):
    """N as the law counts it, and training FLOPs a token without and with the head."""

    parameters: float
    flops: float
    flops_with_head: float


def model_config(blocks: Blocks, shape: Shape, *, expansion: float, vocab_size: int) -> ModelConfig:
    """The model: `num_blocks` times a mixer and a feed-forward layer, E G experts of width d_ff / G."""
    d_model = shape.d_model
    attention = AttentionConfig(num_heads=_num_heads(d_model))
    pattern: tuple[LayerConfig, ...]
    match blocks:
        case "dense":
            pattern = (attention, DenseConfig(d_ff=4 * d_model))
        case "moe":
            pattern = (attention, _experts(4 * d_model, shape.granularity, expansion))
        case "moe-swiglu" if expansion == 1:
            pattern = (attention, DenseConfig(d_ff=3 * d_model, activation="swiglu"))
        case "moe-swiglu":
            moe = MoEConfig(num_experts=round(expansion), d_expert=3 * d_model, activation="swiglu")
            pattern = (attention, moe.model_copy(update={"z_coefficient": 1e-3}))
        case "mamba-moe":
            pattern = (MambaConfig(), _experts(3 * d_model, shape.granularity, expansion))
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, pattern=pattern, repeat=shape.num_blocks)


def counts(law: Law, shape: Shape, config: ModelConfig) -> Counts:
    """What the law's formula takes for a model: exact counts for Mamba, the papers' formulas otherwise."""
    head = 6.0 * config.d_model * config.vocab_size
    if law.blocks == "mamba-moe":
        # no layer of the model depends on the context
        flops = training_flops(config, 1, head=False)
        return Counts(count_parameters(config).non_embedding, flops, flops + head)
    flops = token_flops(law, *shape)
    # the joint law counts the head already
    return Counts(parameters(law, *shape), flops, flops if law.blocks == "moe-swiglu" else flops + head)


def width_step(blocks: Blocks, granularity: int) -> int:
    """Widths at which experts of a Transformer are exactly d_ff / G wide and a multiple of 16."""
    return lcm(WIDTH_STEP, 4 * granularity) if blocks == "moe" else WIDTH_STEP


def smallest_width(blocks: Blocks, granularity: int) -> float:
    """The width below which experts would be narrower than 16."""
    return max(float(WIDTH_STEP), TILE * granularity / (3 if blocks == "mamba-moe" else 4))


def _experts(d_ff: int, granularity: int, expansion: float) -> MoEConfig:
    width = max(TILE, TILE * round(d_ff / granularity / TILE))
    return MoEConfig(num_experts=round(expansion * granularity), d_expert=width, top_k=granularity)


def _num_heads(d_model: int) -> int:
    """Heads of 64 channels where they fit, else of 32 or 16."""
    for width in (64, 32, 16):
        if d_model % width == 0:
            return d_model // width
    raise ValueError(f"d_model={d_model} is not a multiple of 16: choose one that is")
