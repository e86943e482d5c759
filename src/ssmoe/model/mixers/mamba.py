"""The Mamba mixer: gate, causal convolution, selective scan (arXiv 2312.00752, section 3.4, figure 3)."""

from math import ceil
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssmoe.config.layers import MambaConfig
from ssmoe.model.init import init_weights
from ssmoe.model.layer import LayerOut, check_input, check_options
from ssmoe.model.mixers.scan import SSMParameters, scan
from ssmoe.model.norm import LayerNorm, Linear, RMSNorm, use_products
from ssmoe.ops import Ops, Segments, load


class MambaState(NamedTuple):
    """conv: (b, d_inner, d_conv - 1), the convolution's last inputs. ssm: (b, d_inner, d_state) float32."""

    conv: Tensor
    ssm: Tensor


class Conv(nn.Module):
    """The weight (d_inner, d_conv) and bias (d_inner,) of the depthwise convolution."""

    def __init__(self, d_inner: int, d_conv: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_inner, d_conv))
        self.bias = nn.Parameter(torch.empty(d_inner))


def _weight(linear: nn.Module | None) -> Tensor | None:
    assert linear is not None
    return linear._parameters["weight"]  # pyright: ignore[reportPrivateUsage]


class Mamba(nn.Module):
    """A Mamba mixer, without norm and residual; usable on its own: `Mamba(512)(x).x`.

    x: (b, l, d_model) -> (b, l, d_model). d_inner = round(expand * d_model). `dt_rank` "auto" is
    ceil(d_model / 16). learned_state: documents begin from a parameter instead of zeros. `ops` are the
    kernels, by default those for the CPU.
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
        learned_state: bool = False,
        ops: Ops | None = None,
    ) -> None:
        super().__init__()
        check_options(
            MambaConfig, d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank,
            dt_min=dt_min, dt_max=dt_max,
        )  # fmt: skip
        self.ops = ops or load("auto")
        self.d_inner = d_inner = max(1, round(expand * d_model))
        self.d_state, self.d_conv = d_state, d_conv
        self.dt_rank = ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.in_proj = Linear(d_model, 2 * d_inner)
        self.conv = Conv(d_inner, d_conv)
        self.x_proj = Linear(d_inner, self.dt_rank + 2 * d_state)
        self.delta_proj = Linear(self.dt_rank, d_inner)
        self.ssm = SSMParameters(d_inner, d_state, (dt_min, dt_max), learned_state=learned_state)
        self.out_proj = Linear(d_inner, d_model)
        use_products(self, self.ops)
        init_weights(self)

    def forward(
        self, x: Tensor, state: MambaState | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """Mix along l; `state` None is `init_state`."""
        check_input(x, self.in_proj.weight.shape[1], self.ops)
        conv, ssm = (None, None) if state is None else state
        x, z = self.ops.split_linear(x, self.in_proj.weight, (self.d_inner, self.d_inner))  # (b, l, d_inner)
        x, conv = self.ops.causal_conv1d(
            x, self.conv.weight, self.conv.bias, initial_state=conv, segments=segments
        )
        x, projected = self.ops.fork_linear(x, self.x_proj.weight)
        delta, B, C = torch.split(projected, [self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, ssm = scan(self.ops, self.ssm, x, self.delta_proj(delta), B, C, z, state=ssm, segments=segments)
        return LayerOut(self.out_proj(y), MambaState(conv, ssm), None)

    def step(
        self,
        x: Tensor,
        norm: RMSNorm | LayerNorm,
        state: MambaState | None,
        dtype: torch.dtype,
        *,
        out_state: MambaState | None = None,
    ) -> LayerOut:
        """x + self(norm(x)) for a single position (b, 1, d_model), computed in `dtype`, in one op.

        out_state: where the new state is written, which may be `state`. Inference only: raises ValueError
        where a gradient is wanted.
        """
        conv, ssm = self.init_state(x.shape[0], 0, dtype, x.device) if state is None else state
        conv, ssm = conv.to(dtype), ssm.to(torch.promote_types(dtype, torch.float32))
        y, conv, ssm = self.ops.mamba_step(
            x.squeeze(1), norm.weight, self.in_proj.weight, self.conv.weight, self.conv.bias,
            self.x_proj.weight, self.delta_proj.weight, self.ssm.A_log, self.ssm.D, self.ssm.delta_bias,
            self.out_proj.weight, norm_eps=norm.eps,
            norm_bias=norm.bias, conv_state=conv, ssm_state=ssm,
            out_conv=None if out_state is None else out_state.conv,
            out_ssm=None if out_state is None else out_state.ssm,
        )  # fmt: skip
        return LayerOut(y.unsqueeze(1), MambaState(conv, ssm), None)

    def step_weights(self, norm: RMSNorm | LayerNorm) -> tuple[Tensor | None, ...]:
        """What `ops.mamba_steps` takes of a layer behind `norm`."""
        # past nn.Module's attribute look-up, which costs as much as a small layer
        part = self._modules
        own = part["ssm"]._parameters  # type: ignore[union-attr]
        conv = part["conv"]._parameters  # type: ignore[union-attr]
        bias = norm._parameters.get("bias")
        return (
            norm._parameters["weight"], bias, _weight(part["in_proj"]), conv["weight"], conv["bias"],
            _weight(part["x_proj"]), _weight(part["delta_proj"]), own["A_log"], own["D"], own["delta_bias"],
            _weight(part["out_proj"]),
        )  # fmt: skip

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> MambaState:
        """Zeros and the scan's initial state; the size does not depend on `capacity`."""
        del capacity
        wide = torch.promote_types(dtype, torch.float32)
        return MambaState(
            torch.zeros(batch, self.d_inner, self.d_conv - 1, dtype=dtype, device=device),
            self.ssm.start(batch, wide, device),
        )
