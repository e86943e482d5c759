import pytest
import torch

from ssmoe.config.train import LearningRateRatios, TrainConfig
from ssmoe.model.build import build
from ssmoe.training import adamw as adamw_module
from ssmoe.training import optimizer as optimizer_module
from ssmoe.training.optimizer import (
    build_optimizer,
    clip,
    optimizer_tensors,
    parameter_groups,
    restore_optimizer,
    role,
    set_learning_rate,
)
from ssmoe.training.step import train_step
from tests.model.zoo import PATTERNS, small
from tests.training.test_step import random_batch

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
    lines = parameter_groups(build(small("moe-mamba"), device="meta")).describe(TrainConfig())
    assert [line.split(":")[0] for line in lines] == ["weight decay", "no weight decay"]
    assert "ssm.A_log" in lines[1]
    assert "experts.up" in lines[0]


def test_description_names_what_muon_takes():
    model = build(small("moe-mamba"), device="meta")
    *_, line = parameter_groups(model).describe(TrainConfig(optimizer="muon"))
    hidden = [p for name, p in model.named_parameters() if role(name, p) in ("experts", "matrices")]
    assert line.startswith(f"Muon: {sum(p.numel() for p in hidden):,} values in {len(hidden)} tensors")
    assert "router" not in line


def _named(optimizer, model, key):
    """The groups' value of `key` for every parameter."""
    values = {p: group[key] for group in optimizer.param_groups for p in group["params"]}
    return {name: values[parameter] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", MODELS, ids=list(PATTERNS))
def test_every_parameter_has_a_role(config):
    model = build(config, device="meta")
    found = {name: role(name, parameter) for name, parameter in model.named_parameters()}
    assert set(found.values()) <= LearningRateRatios.model_fields.keys()
    assert found.pop("embedding.weight") == "embedding"
    assert {name for name in found if name.startswith("head.")} == {
        n for n, r in found.items() if r == "head"
    }
    assert {name for name in found if "router" in name} == {n for n, r in found.items() if r == "router"}
    for name, parameter in model.named_parameters():
        if found.get(name) in ("experts", "matrices"):
            assert parameter.ndim == (3 if found[name] == "experts" else 2)
            assert any(word in name for word in ("proj", "up", "gate", "down")), name
        if found.get(name) == "other":
            assert any(word in name for word in ("norm", ".conv.", ".ssm.")), name


@pytest.mark.parametrize("config", MODELS, ids=list(PATTERNS))
def test_muon_has_every_projection_and_expert_and_nothing_else(config):
    model = build(config, device="meta")
    optimizer = build_optimizer(parameter_groups(model), TrainConfig(optimizer="muon"))
    for name, parts in _named(optimizer, model, "parts").items():
        hidden = role(name, model.get_parameter(name)) in ("experts", "matrices")
        several = {"in_proj.weight": 2, "qkv_proj.weight": 3}
        fused = several.get(".".join(name.split(".")[-2:]), 1)
        assert parts == (fused if hidden else 0), name


def test_experts_may_be_left_to_adamw_or_have_a_momentum_of_their_own():
    model = build(small("moe-mamba"), device="meta")
    plain, left, slow = (
        build_optimizer(parameter_groups(model), TrainConfig(optimizer="muon", **changes))
        for changes in ({}, {"muon_experts": False}, {"muon_expert_momentum": 0.99})
    )
    parts, without, momenta = (
        _named(plain, model, "parts"),
        _named(left, model, "parts"),
        _named(slow, model, "momentum"),
    )
    for name, parameter in model.named_parameters():
        experts = role(name, parameter) == "experts"
        assert without[name] == (0 if experts else parts[name]), name
        assert momenta[name] == (0.99 if experts else 0.95), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ratios_reach_their_parameters_at_every_rate(optimizer):
    ratios = {"experts": 2.0, "router": 3.0, "embedding": 0.5, "head": 0.25, "matrices": 4.0, "other": 5.0}
    train = TrainConfig(learning_rate_ratios=LearningRateRatios(**ratios), optimizer=optimizer)
    model = build(small("moe-mamba", tied_embeddings=False), device="meta")
    built = build_optimizer(parameter_groups(model), train)
    for rate in (train.learning_rate, 0.3):
        for name, found in _named(built, model, "lr").items():
            assert found == pytest.approx(rate * ratios[role(name, model.get_parameter(name))]), name
        set_learning_rate(built, 0.3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_ratio_is_a_learning_rate(optimizer):
    """Experts at twice the rate move as in a run of twice the rate, all else as in one of the rate itself."""
    once, twice = 0.01, 0.02
    moved = {}
    for key, rate, ratio in (("both", once, 2.0), ("once", once, 1.0), ("twice", twice, 1.0)):
        model = build(small("moe-mamba"))
        train = TrainConfig(
            learning_rate=rate, optimizer=optimizer, learning_rate_ratios=LearningRateRatios(experts=ratio)
        )
        built = build_optimizer(parameter_groups(model), train)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        built.step()
        moved[key] = dict(model.named_parameters())
    for name, parameter in moved["both"].items():
        other = "twice" if role(name, parameter) == "experts" else "once"
        torch.testing.assert_close(parameter, moved[other][name])
    assert not torch.equal(
        moved["once"]["layers.1.layer.experts.up"], moved["twice"]["layers.1.layer.experts.up"]
    )


def test_a_rate_held_in_a_tensor_stays_that_tensor():
    model = build(small("moe-mamba"))
    optimizer = build_optimizer(parameter_groups(model), TrainConfig())
    held = torch.tensor(0.0)
    optimizer.param_groups[0]["lr"] = held
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == 0.5


def _stepped(seed, optimizer="adamw"):
    model = build(small("moe-mamba"), seed=seed)
    optimizer = build_optimizer(parameter_groups(model), TrainConfig(optimizer=optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trips(name):
    model, optimizer = _stepped(0, name)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    other = build(small("moe-mamba"))
    fresh = build_optimizer(parameter_groups(other), TrainConfig(optimizer=name))
    restore_optimizer(fresh, other, tensors)
    restored = optimizer_tensors(fresh, other)
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)
    for parameter in (*model.parameters(), *other.parameters()):
        parameter.grad = torch.ones_like(parameter)
    other.load_state_dict(model.state_dict())
    optimizer.step()
    fresh.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_state_of_another_optimiser_is_refused():
    model, optimizer = _stepped(0, "muon")
    fresh = build_optimizer(parameter_groups(model), TrainConfig())
    with pytest.raises(ValueError, match="another model or optimiser"):
        restore_optimizer(fresh, model, optimizer_tensors(optimizer, model))


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


def test_the_norm_of_narrow_gradients_is_a_wide_one():
    parameters = [torch.nn.Parameter(torch.empty(1000)) for _ in range(2)]
    torch.manual_seed(0)
    for parameter, dtype in zip(parameters, (torch.bfloat16, torch.float32), strict=True):
        parameter.grad_dtype = dtype
        parameter.grad = torch.randn(1000).to(dtype)
    exact = torch.cat([p.grad.double() for p in parameters]).norm()
    norm = clip(parameters, torch.optim.SGD(parameters), 1e6)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(exact), rel=1e-6)


def _moe(**changes: int) -> tuple[torch.nn.Module, TrainConfig, torch.optim.Optimizer]:
    train = TrainConfig(steps=1, batch_size=4, learning_rate=1e-3, precision="bfloat16", **changes)
    model = build(small("moe-mamba"), dtype=torch.bfloat16).train()
    return model, train, build_optimizer(parameter_groups(model), train)


def _step_and_dtypes(monkeypatch, *, large: bool, **changes: int) -> tuple[torch.nn.Module, set]:
    """A model after a step, and the dtypes of its banks' gradients."""
    for module in (optimizer_module, adamw_module):
        monkeypatch.setattr(module, "is_large", lambda p: large and p.ndim == 3)
    model, train, optimizer = _moe(**changes)
    seen = set()
    for name, parameter in model.named_parameters():
        if role(name, parameter) == "experts":
            parameter.register_post_accumulate_grad_hook(lambda p: seen.add(p.grad.dtype))
    batch = random_batch(4, 16)
    for _ in range(2):
        result = train_step(model, optimizer, batch, train, 1e-3, isolate=False)
        assert bool(result.grad_norm.isfinite())
        # nothing of it is left to whoever takes the model next
        assert {p.grad_dtype for p in model.parameters()} == {torch.float32}
        assert all(p.grad is None for p in model.parameters())
    return model, seen


def test_large_banks_keep_narrow_gradients(monkeypatch) -> None:
    narrow, seen = _step_and_dtypes(monkeypatch, large=True)
    assert seen == {torch.bfloat16}
    wide, seen = _step_and_dtypes(monkeypatch, large=False)
    assert seen == {torch.float32}
    for ours, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 2}, {"tbptt": 2}])
def test_gradients_that_are_added_up_stay_wide(monkeypatch, changes) -> None:
    assert _step_and_dtypes(monkeypatch, large=True, **changes)[1] == {torch.float32}


def test_a_step_that_fails_leaves_no_narrow_gradient(monkeypatch) -> None:
    monkeypatch.setattr(optimizer_module, "is_large", lambda p: p.ndim == 3)
    model, train, optimizer = _moe()
    assert len(optimizer.narrow) == 4

    def fail():
        raise RuntimeError("no step")

    monkeypatch.setattr(optimizer, "step", fail)
    with pytest.raises(RuntimeError, match="no step"):
        train_step(model, optimizer, random_batch(4, 16), train, 1e-3, isolate=False)
    for parameter in optimizer.narrow:
        assert parameter.grad is None
        parameter.grad = torch.ones_like(parameter)
