"""The mixture of experts as a module of its own."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssmoe
from ssmoe.config.model import Balance, ModelConfig, MoEConfig, RoutingConfig
from ssmoe.config.train import TrainConfig
from ssmoe.data.packing import Batch
from ssmoe.model.build import build
from ssmoe.model.feedforwards.moe import MoE
from ssmoe.model.feedforwards.router import Router, rebalance
from ssmoe.model.layer import LayerOut
from ssmoe.model.lm import LM
from ssmoe.ops import Segments
from ssmoe.training.step import train_step
from tests.model.zoo import small


def test_is_public_and_defaults_to_four_times_the_width() -> None:
    block = ssmoe.MoE(8, num_experts=3)
    assert block.experts.up.shape == (3, 32, 8)
    out = block(torch.randn(2, 5, 8))
    assert out.x.shape == (2, 5, 8)
    assert out.state == ()


def test_all_experts_with_equal_gates_are_the_mean_of_dense_networks() -> None:
    torch.manual_seed(0)
    block = MoE(6, num_experts=4, d_expert=5, top_k=4).double()
    with torch.no_grad():
        block.router.weight.zero_()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    up, down = block.experts.up, block.experts.down
    dense = torch.stack([F.relu(x @ up[e].T) @ down[e].T for e in range(4)]).mean(0)
    torch.testing.assert_close(block(x).x, dense)


def test_a_dropped_token_gives_zero() -> None:
    torch.manual_seed(0)
    block = MoE(6, num_experts=4, d_expert=5, capacity_factor=0.5).train()
    out = block(torch.randn(4, 8, 6))
    zero = (out.x == 0).all(-1)
    assert out.stats is not None
    assert int(zero.sum()) == int(out.stats.dropped) > 0


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_experts_without_a_token_get_zero_gradients(num_tokens: int) -> None:
    block = MoE(6, num_experts=4, d_expert=5, activation="swiglu").double()
    out = block(torch.randn(1, num_tokens, 6, dtype=torch.float64))
    out.x.sum().backward()
    assert out.stats is not None
    idle = out.stats.load == 0
    assert idle.any()
    for bank in (block.experts.up, block.experts.gate, block.experts.down):
        assert bank is not None
        assert bank.grad is not None
        assert torch.isfinite(bank.grad).all()
        assert not bank.grad[idle].any()
        assert bank.grad[~idle].any()


def test_batch_dependence_is_declared() -> None:
    assert MoE(4, num_experts=2, capacity_factor=1.0).batch_dependent
    assert not MoE(4, num_experts=2).batch_dependent


def test_too_many_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k=3 is more than num_experts=2"):
        MoE(4, num_experts=2, top_k=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0, "num_experts": 2}, "d_model=0: give at least 1"),
        ({"d_model": 4, "num_experts": 0}, "num_experts: .*greater than 0"),
        ({"d_model": 4, "num_experts": 2, "score": "hard"}, "score: .*'softmax' or 'sigmoid'"),
        ({"d_model": 4, "num_experts": 2, "d_expert": 6, "granularity": 4}, "granularity"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(**options)


def test_an_input_of_another_width_is_refused() -> None:
    for shape in ((2, 5, 3), (5, 4)):
        with pytest.raises(ValueError, match=r"expected \(batch, length, 4\)"):
            MoE(4, num_experts=2)(torch.zeros(shape))


def test_granularity_one_is_the_plain_layer_bit_for_bit() -> None:
    plain = build(small("moe-mamba"), seed=3).train()
    pattern = tuple(
        layer.model_copy(update={"granularity": 1}) if isinstance(layer, MoEConfig) else layer
        for layer in small("moe-mamba").pattern
    )
    fine = build(small("moe-mamba").model_copy(update={"pattern": pattern}), seed=3).train()
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    one, two = plain(ids, targets=ids), fine(ids, targets=ids)
    assert torch.equal(one.loss.total, two.loss.total)
    one.loss.total.backward()
    two.loss.total.backward()
    for a, b in zip(plain.parameters(), fine.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_granularity_keeps_sizes(granularity: int) -> None:
    block = MoE(8, num_experts=3, d_expert=16, top_k=2, granularity=granularity)
    assert block.experts.up.shape == (3 * granularity, 16 // granularity, 8)
    out = block(torch.randn(1, 5, 8))
    assert out.stats is not None
    assert int(out.stats.load.sum()) == 5 * 2 * granularity


def test_split_experts_together_are_the_whole_expert() -> None:
    """An expert cut in two and both halves taken with equal weight is the expert."""
    torch.manual_seed(0)
    whole = MoE(6, num_experts=1, d_expert=8, score="sigmoid").double()
    halves = MoE(6, num_experts=1, d_expert=8, granularity=2, score="sigmoid").double()
    with torch.no_grad():
        halves.experts.up.copy_(whole.experts.up.view(2, 4, 6))
        halves.experts.down.copy_(whole.experts.down.view(6, 2, 4).transpose(0, 1))
        halves.router.weight.copy_(whole.router.weight.expand(2, 6))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(halves(x).x, whole(x).x)


def test_shared_experts_are_always_there() -> None:
    torch.manual_seed(0)
    block = MoE(6, num_experts=3, d_expert=8, granularity=2, num_shared_experts=2, weight_scale=1e-30)
    x = torch.randn(2, 5, 6)
    assert block.shared is not None
    torch.testing.assert_close(block(x).x, block.shared(x).x)
    assert block.shared.up.weight.shape == (8, 6)


def test_the_output_norm_is_a_layernorm() -> None:
    torch.manual_seed(0)
    block = MoE(6, num_experts=3, d_expert=8, output_norm=True)
    y = block(torch.randn(2, 5, 6)).x
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 5), atol=1e-6, rtol=0)


def packed_and_padded() -> tuple[Tensor, Segments, Tensor, Segments]:
    """Three documents in one row, and one a row with padding; targets are the ids."""
    lengths, generator = (5, 9, 4), torch.Generator().manual_seed(0)
    rows = [torch.randint(61, (n,), generator=generator) for n in lengths]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).int()
    starts = torch.cat((torch.ones(1), documents.diff())).bool()
    padded, real = torch.zeros(3, 9, dtype=torch.int64), torch.full((3, 9), -1, dtype=torch.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)], real[i, : len(row)] = row, 0
    return (
        torch.cat(rows).unsqueeze(0),
        Segments(documents.unsqueeze(0), starts.unsqueeze(0)),
        padded,
        Segments(real, torch.zeros(3, 9, dtype=torch.bool)),
    )


ROUTED = ["moe", "moe-top2", "moe-fine", "moe-mixtral", "hybrid"]


@pytest.mark.parametrize("name", ROUTED)
def test_gradients_are_equal_for_packed_and_padded(name: str) -> None:
    packed, segments, padded, padding = packed_and_padded()
    gradients = []
    for ids, where in ((packed, segments), (padded, padding)):
        model = build(with_z(small(name)), seed=1).double().train()
        loss = model(ids, segments=where, targets=ids).loss
        assert float(loss.z.detach()) > 0
        loss.total.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [*ROUTED, "moe-mamba"])
def test_gradients_are_equal_with_recomputation(name: str, tied: bool) -> None:
    ids = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))
    gradients, loads = [], []
    for recompute in (False, True):
        model = build(with_z(small(name)), seed=1).double().train()
        if tied:
            for module in model.modules():
                if isinstance(module, Router):
                    torch.nn.init.zeros_(module.weight)
        if recompute:
            for i, layer in enumerate(model.layers):
                model.layers[i] = Recomputed(layer)
        out = model(ids, targets=ids)
        out.loss.total.backward()
        gradients.append([p.grad for p in model.parameters()])
        loads.append([s.load.tolist() for s in out.stats if s is not None])
    assert loads[0] == loads[1]
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert torch.equal(a, b)


class Recomputed(nn.Module):
    """A layer whose forward pass is done again in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: object) -> LayerOut:
        return checkpoint(self.layer, *inputs, use_reentrant=False)


def with_z(config: ModelConfig) -> ModelConfig:
    pattern = [
        layer.model_dump() | ({"z_coefficient": 0.1} if isinstance(layer, RoutingConfig) else {})
        for layer in config.pattern
    ]
    return ModelConfig.model_validate(config.model_dump() | {"pattern": pattern})


def step_gradients(name: str, micro: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], LM, float]:
    """The gradients of one training step over 8 rows, the model after it, and its z-loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(61, (8, 11), generator=generator).numpy()
    batch = Batch(ids[:, :-1], ids[:, 1:], np.zeros((8, 10), np.int32), np.zeros((8, 10), np.bool_))
    model = build(with_z(small(name)), seed=1).double().train()
    gradients: list[Tensor] = []

    def keep(parameters: Iterator[nn.Parameter], *_: object) -> Tensor:
        gradients.extend(p.grad.clone() for p in parameters if p.grad is not None)
        return torch.zeros(())

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", keep)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train = TrainConfig(batch_size=8, micro_batch_size=micro)
    result = train_step(model, optimizer, batch, train, 0.1, isolate=True)
    return gradients, model, float(result.z)


@pytest.mark.parametrize("name", ["moe-fine", "moe-mixtral"])
def test_accumulation_changes_no_gradient_and_no_bias(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 x 8 against 4 x 2: LM loss, z-loss and the balancing bias."""
    whole, one, z_one = step_gradients(name, 8, monkeypatch)
    parts, four, z_four = step_gradients(name, 2, monkeypatch)
    assert z_one == pytest.approx(z_four, rel=1e-12)
    assert z_one > 0
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    moved = False
    for (key, a), b in zip(one.named_buffers(), four.buffers(), strict=True):
        assert key.endswith("router.bias")
        assert torch.equal(a, b)
        moved = moved or bool(a.any())
    assert moved is (name == "moe-fine")


def test_the_auxiliary_balance_is_the_mean_of_its_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of means, so it is defined on the micro-batch and differs from that of the whole batch."""
    ids = torch.randint(61, (8, 11), generator=torch.Generator().manual_seed(0))[:, :-1]
    model = build(small("moe"), seed=1).double().train()
    losses = [model(ids[i : i + 2], targets=ids[i : i + 2]).loss.balance.detach() for i in range(0, 8, 2)]
    whole = model(ids, targets=ids).loss.balance.detach()
    batch = Batch(ids.numpy(), ids.numpy(), np.zeros((8, 10), np.int32), np.zeros((8, 10), np.bool_))
    train = TrainConfig(batch_size=8, micro_batch_size=2)
    result = train_step(model, torch.optim.SGD(model.parameters()), batch, train, 0.0, isolate=True)
    torch.testing.assert_close(result.balance, torch.stack(losses).mean())
    assert abs(float(result.balance - whole)) > 1e-6


@pytest.mark.parametrize(("balance", "recovers"), [("auxiliary", True), ("bias", True), ("none", False)])
def test_a_router_with_a_lead_of_two_recovers_with_balancing_alone(balance: Balance, recovers: bool) -> None:
    """200 steps, 8 experts, the first with a logit lead of 2; bias_rate 0.01 or coefficient 0.1.

    Learning rate 3e-3. Switch's own coefficient, 0.01, is too weak here: the LM part holds the lead.
    """
    torch.manual_seed(0)
    block = MoE(17, num_experts=8, d_expert=16, balance=balance, bias_rate=0.01, balance_coefficient=0.1)
    with torch.no_grad():
        block.router.weight.mul_(0.2)
        block.router.weight[:, 16] = 0
        block.router.weight[0, 16] = 2
    target = nn.Linear(17, 17)
    optimizer = torch.optim.AdamW(block.parameters(), lr=3e-3)
    loads: list[Tensor] = []
    for _ in range(200):
        x = torch.cat((torch.randn(8, 32, 16), torch.ones(8, 32, 1)), dim=-1)  # the last input is a constant
        out = block(x)
        assert out.stats is not None
        ((out.x - target(x).detach()).square().mean() + out.stats.balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        rebalance(block, out.stats.load)
        loads.append(out.stats.load.double())
    assert float(loads[0].max() / loads[0].mean()) > 6
    last = torch.stack(loads[-10:]).sum(0)
    assert (float(last.max() / last.mean()) < 1.5) is recovers
