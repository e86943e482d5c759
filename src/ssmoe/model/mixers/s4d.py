"""S4D: a diagonal state space that is the same at every position (arXiv 2206.11893), in Mamba's block.

h_t = exp(delta A) h_{t-1} + x_t, y_t = Re<C Bbar, h_t> + D x_t, with Bbar = (exp(delta A) - 1) / A, the
zero-order hold of B = 1, which C learns for both. Being time-invariant it is also a convolution,
y = K * x + D x with K_t = Re<C Bbar, exp(t delta A)>.
"""

from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmoe.model.init import init_weights
from ssmoe.model.layer import LayerOut
from ssmoe.model.mixers.mamba import Conv
from ssmoe.model.norm import Float32Module, Linear
from ssmoe.ops import Ops, Segments, load


class S4DState(NamedTuple):
    """conv: (b, d_inner, d_conv - 1). ssm: (b, d_inner, n) float32, complex ones (b, d_inner, n, 2)."""

    conv: Tensor
    ssm: Tensor


class DiagonalParameters(Float32Module):
    """A, C, D and the step sizes, which stay float32 or wider; forward returns (rate, CB, D).

    rate = delta A and CB = C Bbar: (d_inner, n), real or complex. D: (d_inner,).
    """

    def __init__(
        self, d_inner: int, d_state: int, delta_range: tuple[float, float], *, is_complex: bool
    ) -> None:
        super().__init__()
        self.delta_range = delta_range
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.A_imaginary = nn.Parameter(torch.empty(d_inner, d_state)) if is_complex else None
        self.C = nn.Parameter(torch.empty((d_inner, d_state, 2) if is_complex else (d_inner, d_state)))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.delta_bias = nn.Parameter(torch.empty(d_inner))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Discretised by zero-order hold."""
        A, C = -torch.exp(self.A_log), self.C
        if self.A_imaginary is not None:
            # a state and its conjugate add up to twice the real part
            A, C = torch.complex(A, self.A_imaginary), 2 * torch.view_as_complex(C)
        rate = F.softplus(self.delta_bias).unsqueeze(-1) * A
        return rate, C * (torch.exp(rate) - 1) / A, self.D


class S4D(nn.Module):
    """Mamba's block around S4D, without norm and residual. x: (b, l, d_model) -> (b, l, d_model)."""

    batch_dependent = False

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        parametrisation: Literal["real", "complex"] = "complex",
        d_conv: int = 4,
        expand: float = 2.0,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        ops: Ops | None = None,
    ) -> None:
        super().__init__()
        self.ops = ops or load("auto")
        self.d_inner = d_inner = max(1, round(expand * d_model))
        self.d_state, self.d_conv, self.is_complex = d_state, d_conv, parametrisation == "complex"
        self.in_proj = Linear(d_model, 2 * d_inner)
        self.conv = Conv(d_inner, d_conv)
        self.ssm = DiagonalParameters(d_inner, d_state, (dt_min, dt_max), is_complex=self.is_complex)
        self.out_proj = Linear(d_inner, d_model)
        init_weights(self)

    def forward(self, x: Tensor, state: S4DState | None = None, segments: Segments | None = None) -> LayerOut:
        """Mix along l; `state` None is the zero state."""
        conv, ssm = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, d_inner) each
        x, conv = self.ops.causal_conv1d(
            x, self.conv.weight, self.conv.bias, initial_state=conv, segments=segments
        )
        rate, CB, D = self.ssm()
        h = None if ssm is None else torch.view_as_complex(ssm) if self.is_complex else ssm
        wide = x.to(D.dtype)
        y, h = scan(wide, rate, CB, h, segments)
        y = ((y + D * wide) * F.silu(z.to(D.dtype))).to(x.dtype)
        if segments is not None:
            y = y.masked_fill(~segments.real.unsqueeze(-1), 0)
        # one memory layout always, because strides decide how a product is vectorised and so rounded
        h = h.contiguous()
        return LayerOut(
            self.out_proj(y), S4DState(conv, torch.view_as_real(h) if self.is_complex else h), None
        )

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> S4DState:
        """The zero state; its size does not depend on `capacity`."""
        del capacity
        wide = torch.promote_types(dtype, torch.float32)
        shape = (
            (batch, self.d_inner, self.d_state, 2) if self.is_complex else (batch, self.d_inner, self.d_state)
        )
        return S4DState(
            torch.zeros(batch, self.d_inner, self.d_conv - 1, dtype=dtype, device=device),
            torch.zeros(shape, dtype=wide, device=device),
        )


def scan(
    x: Tensor, rate: Tensor, CB: Tensor, h: Tensor | None, segments: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the state (b, d, n) after each row's last real token, from x (b, l, d) and h (b, d, n).

    rate, CB: (d, n). One position is a step of the recurrence, more are a convolution.
    """
    if h is None:
        h = rate.new_zeros(x.shape[0], *rate.shape)
    if segments is not None:
        return _by_document(x, rate, CB, h, segments)
    return recur(x, rate, CB, h) if x.shape[1] == 1 else convolve(x, rate, CB, h)


def recur(x: Tensor, rate: Tensor, CB: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Position after position."""
    decay = torch.exp(rate)
    outputs: list[Tensor] = []
    for x_t in x.unbind(1):
        h = decay * h + x_t.unsqueeze(-1)
        outputs.append(_real((CB * h).sum(-1)))
    return torch.stack(outputs, dim=1), h


def convolve(x: Tensor, rate: Tensor, CB: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """All positions at once, by fast Fourier transform, and what is left of `h`."""
    length = x.shape[1]
    powers = _powers(rate, length + 1)  # (d, n, l + 1)
    y, end = _convolve_zero_state(x, powers, CB)
    y = y + _real(torch.einsum("bdn,dnl->bld", CB * h, powers[..., 1:]))
    return y, end + powers[..., length] * h


def _convolve_zero_state(x: Tensor, powers: Tensor, CB: Tensor) -> tuple[Tensor, Tensor]:
    length = x.shape[1]
    powers = powers[..., :length]
    kernel = _real(torch.einsum("dn,dnl->ld", CB, powers))
    # twice the length, so that the end does not wrap around to the beginning
    spectrum = cast(Tensor, torch.fft.rfft(x, 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0))
    y = cast(Tensor, torch.fft.irfft(spectrum, 2 * length, dim=1))[:, :length]
    return y, torch.einsum("bld,dnl->bdn", x.to(powers.dtype), powers.flip(-1))


def _by_document(x: Tensor, rate: Tensor, CB: Tensor, h: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Each document becomes a row of its own, right-aligned so that all end together."""
    b, _, d = x.shape
    real = segments.real
    number = segments.resets.to(torch.int64).cumsum(1)  # (b, l), 0 continues the row's state
    most = int(number.max()) + 1
    rows = most * torch.arange(b, device=x.device).unsqueeze(1)
    keys = (rows + number)[real]  # (tokens,)
    ends = (rows + (number * real).amax(dim=1, keepdim=True)).flatten()
    # the documents that have tokens here or that a row ends with, if only with its state
    documents = cast(Tensor, torch.unique(torch.cat((keys, ends))))
    keys, ends = torch.searchsorted(documents, keys), torch.searchsorted(documents, ends)
    counts = torch.zeros_like(documents).scatter_add_(0, keys, torch.ones_like(keys))
    longest = max(1, int(counts.max()))
    begins = counts.cumsum(0) - counts
    place = torch.arange(len(keys), device=x.device) - begins[keys]  # in the own document
    column = place + longest - counts[keys]
    padded = x.new_zeros(len(documents), longest, d).index_put((keys, column), x[real])
    start = h[documents // most] * (documents % most == 0).view(-1, 1, 1)

    powers = _powers(rate, longest + 1)  # (d, n, longest + 1)
    y, end = _convolve_zero_state(padded, powers, CB)
    # the state enters where the document begins, behind the zeros in front
    left = _real(torch.einsum("bdn,dnl->bld", CB * start, powers))[keys, place + 1]
    y = torch.zeros_like(x).index_put((real.nonzero(as_tuple=True)), y[keys, column] + left)
    return y, (end + powers[..., counts].permute(2, 0, 1) * start)[ends]


def _powers(rate: Tensor, length: int) -> Tensor:
    """exp(rate)^0 to exp(rate)^(length - 1): (d, n, length)"""
    steps = torch.arange(
        length, device=rate.device, dtype=rate.real.dtype if rate.is_complex() else rate.dtype
    )
    return torch.exp(rate.unsqueeze(-1) * steps)


def _real(values: Tensor) -> Tensor:
    return values.real if values.is_complex() else values
