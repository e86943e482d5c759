"""The position-wise feed-forward layer: down act(up x), or SwiGLU (arXiv 2002.05202)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmoe.config.model import Activation
from ssmoe.model.init import init_weights
from ssmoe.model.layer import LayerOut
from ssmoe.model.norm import Linear
from ssmoe.ops import Segments


class Dense(nn.Module):
    """A feed-forward layer without biases, norm and residual. x: (b, l, d_model) -> (b, l, d_model)."""

    batch_dependent = False

    def __init__(self, d_model: int, *, d_ff: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.up = Linear(d_model, d_ff)
        self.gate = Linear(d_model, d_ff) if activation == "swiglu" else None
        self.down = Linear(d_ff, d_model)
        init_weights(self)

    def forward(
        self, x: Tensor, state: tuple[()] | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """Each position alone; state and segments change nothing."""
        del state, segments
        if self.gate is not None:
            hidden = F.silu(self.gate(x)) * self.up(x)
        elif self.activation == "relu":
            hidden = F.relu(self.up(x))
        else:
            hidden = F.relu(self.up(x)).square()
        return LayerOut(self.down(hidden), (), None)

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> tuple[()]:
        """Stateless."""
        del batch, capacity, dtype, device
        return ()
