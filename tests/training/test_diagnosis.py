"""What is named when a step leaves the numbers."""

import pytest
import torch

from ssmoe.model.build import build
from ssmoe.model.lm import LM
from ssmoe.training.diagnosis import where_not_finite
from tests.model.zoo import small

IDS = torch.arange(12).view(2, 6)


def explain(model: LM) -> str:
    found = where_not_finite(model, lambda: model(IDS, targets=IDS).loss.total.backward())
    assert all(p.grad is None for p in model.parameters())
    return found


def test_weights_are_named() -> None:
    model = build(small("moe-mamba"))
    with torch.no_grad():
        model.get_parameter("layers.1.layer.experts.up")[0, 0, 0] = torch.inf
    assert explain(model) == "weights that are not numbers: layers.1.layer.experts.up"


def test_the_first_layer_whose_output_overflows_is_named() -> None:
    model = build(small("moe-mamba"))
    with torch.no_grad():
        model.get_parameter("layers.1.layer.experts.up").fill_(1e38)
        model.get_parameter("layers.1.layer.experts.down").fill_(1e38)
    assert explain(model) == "the first values that are not numbers come out of layer 1 (MoE)"


def test_the_largest_gradient_is_named_where_only_the_norm_overflows() -> None:
    model = build(small("moe-mamba"))
    name = "layers.0.layer.in_proj.weight"

    def work() -> None:
        model(IDS, targets=IDS).loss.total.backward()
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient[0, 0] = 1e20

    assert where_not_finite(model, work) == (
        f"the gradients are numbers, but too large to add their squares: 1e+20 in {name}"
    )


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (["layers.0.layer.in_proj.weight"], "these gradients are none: layers.0.layer.in_proj.weight"),
        (None, "the loss and all gradients are none"),
        ([], "a second pass over the same batch gives numbers"),
    ],
)
def test_gradients_are_named(broken: list[str] | None, says: str) -> None:
    model = build(small("moe-mamba"))

    def work() -> None:
        model(IDS, targets=IDS).loss.total.backward()
        for name, parameter in model.named_parameters():
            if broken is None or name in broken:
                assert parameter.grad is not None
                parameter.grad.fill_(torch.nan)

    assert says in where_not_finite(model, work)
    assert not any(layer._forward_hooks for layer in model.layers)
