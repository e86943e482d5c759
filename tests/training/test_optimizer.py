import pytest
import torch

from ssmoe.config.train import TrainConfig
from ssmoe.model.build import build
from ssmoe.training.optimizer import (
    build_optimizer,
    clip,
    optimizer_tensors,
    parameter_groups,
    restore_optimizer,
)
from tests.model.zoo import PATTERNS, small

MODELS = [small(name, norm="layernorm", tied_embeddings=False, head_bias=True) for name in PATTERNS]


@pytest.mark.parametrize("config", MODELS, ids=list(PATTERNS))
def test_every_parameter_is_in_one_group(config):
    model = build(config, device="meta")
    decayed, not_decayed = parameter_groups(model)
    assert sorted([*decayed, *not_decayed]) == sorted(name for name, _ in model.named_parameters())
    assert {id(p) for p in decayed.values()}.isdisjoint(id(p) for p in not_decayed.values())


@pytest.mark.parametrize("config", MODELS, ids=list(PATTERNS))
def test_only_matrices_decay(config):
    decayed, not_decayed = parameter_groups(build(config, device="meta"))
    words = ("A_log", "A_imaginary", ".D", "delta_bias", "initial_state", "norm", "bias")
    assert [name for name in decayed if any(word in name for word in words)] == []
    assert all(any(word in name for word in words) for name in not_decayed)
    assert "embedding.weight" in decayed
    assert "head.bias" in not_decayed


def test_decay_moves_only_what_it_should():
    model = build(small("moe-mamba"))
    groups = parameter_groups(model)
    optimizer = build_optimizer(groups, TrainConfig(weight_decay=0.5, learning_rate=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5 if name in groups.decayed else 1)
        torch.testing.assert_close(parameter.detach(), expected)


def test_description_names_what_does_not_decay():
    lines = parameter_groups(build(small("moe-mamba"), device="meta")).describe()
    assert [line.split(":")[0] for line in lines] == ["weight decay", "no weight decay"]
    assert "ssm.A_log" in lines[1]
    assert "experts.up" in lines[0]


def _stepped(seed):
    model = build(small("moe-mamba"), seed=seed)
    optimizer = build_optimizer(parameter_groups(model), TrainConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_state_round_trips():
    model, optimizer = _stepped(0)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    other, fresh = build(small("moe-mamba")), None
    fresh = build_optimizer(parameter_groups(other), TrainConfig())
    restore_optimizer(fresh, other, tensors)
    restored = optimizer_tensors(fresh, other)
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_state_of_another_model_is_refused(change):
    model, optimizer = _stepped(0)
    tensors = optimizer_tensors(optimizer, model)
    name = "exp_avg:embedding.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["exp_avg:nothing"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][1:]
    fresh = build_optimizer(parameter_groups(model), TrainConfig())
    with pytest.raises(ValueError, match="another model"):
        restore_optimizer(fresh, model, tensors)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clipping_is_that_of_torch(device, most):
    def steps(clipped):
        torch.manual_seed(0)
        model = torch.nn.Linear(7, 5).to(device)
        optimizer = build_optimizer(parameter_groups(model), TrainConfig(learning_rate=0.1))
        norms = []
        for _ in range(4):
            (model(torch.randn(3, 7).to(device)).square().sum() * 9).backward()
            norms.append(float(clipped(model, optimizer)))
            optimizer.step()
            optimizer.zero_grad()
        return norms, [p.detach() for p in model.parameters()]

    def ours(model, optimizer):
        return clip(model.parameters(), optimizer, most)

    def theirs(model, optimizer):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), most)

    torch.testing.assert_close(steps(ours), steps(theirs), rtol=1e-5, atol=1e-6)
