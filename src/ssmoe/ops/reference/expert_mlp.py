"""The expert bank: every token through its experts' two-layer networks, added up with the router's weights.

y_t = sum_k weight_tk down_e act(up_e x_t), e = expert_tk; gated: down_e (act(gate_e x_t) * up_e x_t)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "relu_squared", "silu")


def expert_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    *,
    expert: Tensor,
    weight: Tensor,
    activation: str,
) -> Tensor:
    """Apply to each token its experts and return (t, d) in x's dtype.

    x: (t, d), float32, bfloat16 or float64. up, gate: (e, f, d). down: (e, d, f). expert: (t, k) int32, -1
    for a dropped assignment or padding. weight: (t, k) float32. activation: "relu", "relu_squared" or
    "silu"; "silu" with a gate is SwiGLU. An expert without tokens gets a zero gradient.
    """
    t, k = expert.shape
    assigned = expert.flatten().to(torch.int64)
    order = torch.argsort(assigned, stable=True)  # dropped ones first, then expert by expert
    counts = torch.bincount(assigned + 1, minlength=up.shape[0] + 1)
    rows = torch.split(x[order // k], [int(count) for count in counts])
    outputs = [torch.zeros_like(rows[0])]
    for e, tokens in enumerate(rows[1:]):
        hidden = tokens @ up[e].t().to(x.dtype)
        inner = (
            _activate(hidden, activation)
            if gate is None
            else (_activate(tokens @ gate[e].t().to(x.dtype), activation) * hidden)
        )
        outputs.append(inner @ down[e].t().to(x.dtype))
    slots = torch.zeros(t * k, x.shape[1], dtype=x.dtype, device=x.device).index_copy(
        0, order, torch.cat(outputs)
    )
    accumulate = torch.promote_types(x.dtype, torch.float32)
    return (
        (slots.view(t, k, x.shape[1]).to(accumulate) * weight.unsqueeze(-1).to(accumulate)).sum(1).to(x.dtype)
    )


def _activate(x: Tensor, activation: str) -> Tensor:
    match activation:
        case "relu":
            return F.relu(x)
        case "relu_squared":
            return F.relu(x).square()
        case "silu":
            return F.silu(x)
        case _:
            raise ValueError(f"activation={activation!r} is not one of: {', '.join(ACTIVATIONS)}")
