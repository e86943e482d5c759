"""The Mamba mixer: gate, causal convolution, selective scan (arXiv 2312.00752, section 3.4, figure 3)."""

from math import ceil
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssmoe.model.init import init_weights
from ssmoe.model.layer import LayerOut
from ssmoe.model.norm import Float32Module, LayerNorm, Linear, RMSNorm, use_products
from ssmoe.ops import Ops, Segments, load


class MambaState(NamedTuple):
    """conv: (b, d_inner, d_conv - 1), the convolution's last inputs. ssm: (b, d_inner, d_state) float32."""

    conv: Tensor
    ssm: Tensor


class SSMParameters(Float32Module):
    """A_log, D and the delta bias, which stay float32 or wider; forward returns (A, D, delta_bias).

    A = -exp(A_log): (d_inner, d_state). D, delta_bias: (d_inner,).
    """

    def __init__(self, d_inner: int, d_state: int, delta_range: tuple[float, float]) -> None:
        super().__init__()
        self.delta_range = delta_range
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.delta_bias = nn.Parameter(torch.empty(d_inner))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, D and the delta bias."""
        return -torch.exp(self.A_log), self.D, self.delta_bias


class Conv(nn.Module):
    """The weight (d_inner, d_conv) and bias (d_inner,) of the depthwise convolution."""

    def __init__(self, d_inner: int, d_conv: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_inner, d_conv))
        self.bias = nn.Parameter(torch.empty(d_inner))


class Mamba(nn.Module):
    """A Mamba mixer, without norm and residual; usable on its own: `Mamba(512)(x).x`.

    x: (b, l, d_model) -> (b, l, d_model). d_inner = round(expand * d_model). `dt_rank` "auto" is
    ceil(d_model / 16). `ops` are the kernels, by default those for the CPU.
    """

    batch_dependent = False

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        ops: Ops | None = None,
    ) -> None:
        super().__init__()
        self.ops = ops or load("auto")
        self.d_inner = d_inner = max(1, round(expand * d_model))
        self.d_state, self.d_conv = d_state, d_conv
        self.dt_rank = ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.in_proj = Linear(d_model, 2 * d_inner)
        self.conv = Conv(d_inner, d_conv)
        self.x_proj = Linear(d_inner, self.dt_rank + 2 * d_state)
        self.delta_proj = Linear(self.dt_rank, d_inner)
        self.ssm = SSMParameters(d_inner, d_state, (dt_min, dt_max))
        self.out_proj = Linear(d_inner, d_model)
        use_products(self, self.ops)
        init_weights(self)

    def forward(
        self, x: Tensor, state: MambaState | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """Mix along l; `state` None is the zero state."""
        conv, ssm = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, d_inner) each
        x, conv = self.ops.causal_conv1d(
            x, self.conv.weight, self.conv.bias, initial_state=conv, segments=segments
        )
        delta, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        A, D, delta_bias = self.ssm()
        y, ssm = self.ops.selective_scan(
            x, self.delta_proj(delta), A, B, C, D, z, delta_bias, initial_state=ssm, segments=segments
        )
        return LayerOut(self.out_proj(y), MambaState(conv, ssm), None)

    def step(
        self, x: Tensor, norm: RMSNorm | LayerNorm, state: MambaState | None, dtype: torch.dtype
    ) -> LayerOut:
        """x + self(norm(x)) for a single position (b, 1, d_model), computed in `dtype`, in one op.

        Inference only: raises ValueError where a gradient is wanted.
        """
        conv, ssm = self.init_state(x.shape[0], 0, dtype, x.device) if state is None else state
        conv, ssm = conv.to(dtype), ssm.to(torch.promote_types(dtype, torch.float32))
        y, conv, ssm = self.ops.mamba_step(
            x.squeeze(1), norm.weight, self.in_proj.weight, self.conv.weight, self.conv.bias,
            self.x_proj.weight, self.delta_proj.weight, self.ssm.A_log, self.ssm.D, self.ssm.delta_bias,
            self.out_proj.weight, norm_eps=norm.eps,
            norm_bias=norm.bias, conv_state=conv, ssm_state=ssm,
        )  # fmt: skip
        return LayerOut(y.unsqueeze(1), MambaState(conv, ssm), None)

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> MambaState:
        """The zero state; its size does not depend on `capacity`."""
        del capacity
        wide = torch.promote_types(dtype, torch.float32)
        return MambaState(
            torch.zeros(batch, self.d_inner, self.d_conv - 1, dtype=dtype, device=device),
            torch.zeros(batch, self.d_inner, self.d_state, dtype=wide, device=device),
        )
