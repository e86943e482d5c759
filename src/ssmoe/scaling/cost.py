"""What a block costs: parameters and training FLOPs of `num_blocks` blocks of width d, as polynomials in d.

One block is a mixer and a feed-forward layer. E is the expansion N_MoE / N_ff and G the granularity
d_ff / d_expert, so a block has E G experts and each token visits G of them (arXiv 2402.07871, section 3).

Transformers, as the paper counts (equation 10, c_f = 6, c_r = 14; no embedding, head, norm, router weights or
attention scores; d_ff = 4 d):

    N = (8 E + 4) d^2 num_blocks        F / D = (12 c_f d^2 + c_r E G d) num_blocks

Mamba, as `ssmoe.config.count` counts, so that law and library agree on what a token costs. The paper's
formula is adapted in four places. Attention's 4 d^2 becomes a Mamba layer (d_inner = 2 d, d_state = 16,
d_conv = 4, dt_rank = d / 16). d_ff is 3 d, which keeps the active parameters of a pair near 12 d^2, as
arXiv 2401.04081 does. Routers, norms, convolution and scan are counted. And c_r is 6, the router's own
multiplications, because tokens reach our experts by index, not by the one-hot products that are the paper's
other 8; a cheaper router makes finer granularity look better than in the paper. With R = d E G, for a pair:

    Mamba    matrices 6.25 d^2 + 64 d; other parameters 46 d; scan and convolution 240 d forward FLOPs
    N        (6.25 + 6 E) d^2 + 112 d + R, of which 2 d are RMSNorms; a last norm adds d once
    F / D    6 (12.25 d^2 + 64 d + R) + 720 d

Exact for the shapes of `ssmoe.scaling.shape` wherever 16 divides d and 16 G divides 3 d.
"""

from functools import cache
from typing import Literal, NamedTuple

Blocks = Literal["dense", "moe", "moe-swiglu", "mamba-moe"]
"""dense, moe: the Transformers of arXiv 2402.07871. moe-swiglu: those of arXiv 2502.05172, which count the
embeddings. mamba-moe: MoE-Mamba."""

WIDTH_PER_BLOCK = 64
"""d = 64 num_blocks along which the laws were fitted."""
JOINT_VOCABULARY = 50257
"""GPT-2's, whose embedding and head arXiv 2502.05172 counts."""


class Terms(NamedTuple):
    """A count: num_blocks (square d^2 + linear d + routed G d) + once d."""

    square: float
    linear: float = 0.0
    routed: float = 0.0
    once: float = 0.0

    def at(self, d_model: float, num_blocks: float, granularity: float) -> float:
        """The count of `num_blocks` blocks of width `d_model`."""
        block = self.square * d_model + self.linear + self.routed * granularity
        return d_model * (num_blocks * block + self.once)


class Cost(NamedTuple):
    """Parameters as the law counts them, those one token uses, and training FLOPs a token."""

    total: Terms
    active: Terms
    flops: Terms


@cache
def block_cost(blocks: Blocks, expansion: float) -> Cost:
    """The counts of a kind of block at expansion E."""
    match blocks:
        case "dense":
            return Cost(total=Terms(12), active=Terms(12), flops=Terms(72))
        case "moe":
            return Cost(
                total=Terms(8 * expansion + 4), active=Terms(12), flops=Terms(72, routed=14 * expansion)
            )
        case "moe-swiglu":
            # F = 6 N_act D, as that paper counts; a SwiGLU of hidden width 3 d is 9 d^2
            once = 2.0 * JOINT_VOCABULARY
            return Cost(
                total=Terms(9 * expansion + 4, once=once),
                active=Terms(13, once=once),
                flops=Terms(6 * 13, once=6 * once),
            )
        case "mamba-moe":
            return Cost(
                total=Terms(6.25 + 6 * expansion, linear=112, routed=expansion, once=1),
                active=Terms(12.25, linear=112, routed=expansion, once=1),
                flops=Terms(6 * 12.25, linear=6 * 64 + 720, routed=6 * expansion),
            )
