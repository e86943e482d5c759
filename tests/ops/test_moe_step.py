"""One position of a mixture of experts is what the layer gives for it."""

import pytest
import torch

from ssmoe.model.feedforwards.moe import MoE
from ssmoe.ops import load, missing


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2, "normalise_weights": True, "weight_scale": 3.0, "activation": "swiglu"},
        {
            "granularity": 2,
            "score": "sigmoid",
            "balance": "bias",
            "output_norm": True,
            "num_shared_experts": 1,
        },
    ],
)
@torch.no_grad()
def test_a_step_is_the_layer(options: dict[str, object], backend: str) -> None:
    if reason := missing(backend):
        pytest.skip(reason)
    torch.manual_seed(0)
    layer = MoE(16, num_experts=4, d_expert=8, ops=load(backend), **options).eval()  # pyright: ignore[reportArgumentType]
    for parameter in layer.parameters():
        parameter.normal_()
    if layer.router.bias is not None:
        layer.router.bias.normal_()
    x = torch.randn(5, 1, 16)
    torch.testing.assert_close(layer.step(x), layer(x).x)
