"""Parallel MoE-Mamba: a mixer and a feed-forward read the same normed input and are added up.

y = Mamba(x) + MoE(x), x = LN(residual) (arXiv 2401.04081, section 5.1)
"""

import torch
from torch import Tensor, nn

from ssmoe.model.feedforwards.moe import MoE
from ssmoe.model.layer import LayerOut
from ssmoe.model.mixers.mamba import Mamba, MambaState
from ssmoe.ops import Segments


class Parallel(nn.Module):
    """A Mamba mixer beside an MoE, without norm and residual. x: (b, l, d_model) -> (b, l, d_model)."""

    def __init__(self, mamba: Mamba, moe: MoE) -> None:
        super().__init__()
        self.mamba, self.moe = mamba, moe
        self.batch_dependent = moe.batch_dependent

    def forward(
        self, x: Tensor, state: MambaState | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """The mixer's state, the MoE's statistics."""
        mixed: LayerOut = self.mamba(x, state, segments)
        routed: LayerOut = self.moe(x, None, segments)
        return LayerOut(mixed.x + routed.x, mixed.state, routed.stats)

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> MambaState:
        """The mixer's."""
        return self.mamba.init_state(batch, capacity, dtype, device)
