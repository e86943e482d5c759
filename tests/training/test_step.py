import numpy as np
import pytest
import torch

from ssmoe.config.model import MoEConfig, ParallelConfig, RoutingConfig
from ssmoe.config.train import TrainConfig
from ssmoe.data.packing import Batch
from ssmoe.model.build import build
from ssmoe.ops import Segments
from ssmoe.training.step import train_step
from tests.model.zoo import PATTERNS, small


def random_batch(rows, context, vocabulary=61):
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocabulary, (rows, context + 1))
    starts = generator.random((rows, context)) < 0.15
    documents = starts.cumsum(1).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], documents, starts)


def segments(batch, begin, count=2):
    part = slice(begin, begin + count)
    return Segments(torch.from_numpy(batch.documents[part]), torch.from_numpy(batch.starts[part]))


def unbalanced(layer):
    if isinstance(layer, MoEConfig):
        layer = layer.model_copy(update={"capacity_factor": None})
    return (
        layer.model_copy(update={"balance_coefficient": 0.0}) if isinstance(layer, RoutingConfig) else layer
    )


def dropless(name):
    config = small(name, repeat=1)
    pattern = [
        layer.model_copy(update={"moe": unbalanced(layer.moe)})
        if isinstance(layer, ParallelConfig)
        else unbalanced(layer)
        for layer in config.pattern
    ]
    return config.model_copy(update={"pattern": tuple(pattern)})


def gradients(config, batch, micro, *, isolate=True):
    """With a rate of 1 and no clipping, plain gradient descent moves each weight by its gradient."""
    model = build(config).double().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train = TrainConfig(batch_size=8, micro_batch_size=micro, clip_norm=1e12)
    result = train_step(model, torch.optim.SGD(model.parameters()), batch, train, 1.0, isolate=isolate)
    return result, {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", list(PATTERNS))
def test_micro_batches_add_up_to_the_whole_batch(name):
    batch, config = random_batch(8, 12), dropless(name)
    whole, expected = gradients(config, batch, None)
    parts, found = gradients(config, batch, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.lm, whole.lm, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.grad_norm, whole.grad_norm, rtol=0, atol=1e-12)
    for layer, stats in whole.routers.items():
        assert torch.equal(parts.routers[layer].load, stats.load)
        for key in ("entropy", "confidence"):
            found, expected = (getattr(result.routers[layer], key) for result in (parts, whole))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_capacity_is_claimed_within_a_micro_batch():
    batch = random_batch(8, 12)
    config = small("moe-mamba", repeat=1)
    result, _ = gradients(config, batch, 2)
    model = build(config).double().train()
    parts = [model(torch.from_numpy(batch.ids[i : i + 2]), segments=segments(batch, i)) for i in (0, 2, 4, 6)]
    stats = [part.stats[1] for part in parts]
    assert int(result.routers[1].dropped) == sum(int(s.dropped) for s in stats) > int(stats[0].dropped) > 0
    assert torch.equal(result.routers[1].load, torch.stack([s.load for s in stats]).sum(0))
    balance = torch.stack([s.balance for s in stats]).mean()
    torch.testing.assert_close(result.balance, balance.detach(), rtol=0, atol=1e-12)


def test_isolation_decides_whether_documents_see_each_other():
    batch, config = random_batch(8, 12), dropless("mamba")
    model, ids = build(config).double().train(), torch.from_numpy(batch.ids)
    targets, losses = torch.from_numpy(batch.targets), []
    for isolate, documents in ((True, segments(batch, 0, 8)), (False, None)):
        found, _ = gradients(config, batch, None, isolate=isolate)
        expected = model(ids, segments=documents, targets=targets).loss.lm.detach()
        torch.testing.assert_close(found.lm, expected, rtol=0, atol=1e-12)
        losses.append(float(expected))
    assert abs(losses[0] - losses[1]) > 1e-6


def test_clipping_bounds_the_update_and_reports_the_norm_before_it():
    batch, config = random_batch(8, 12), dropless("moe-mamba")
    model = build(config).double().train()
    before = [p.detach().clone() for p in model.parameters()]
    train = TrainConfig(batch_size=8, clip_norm=1e-3)
    result = train_step(model, torch.optim.SGD(model.parameters()), batch, train, 1.0, isolate=True)
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    assert float(result.grad_norm) > 1e-3
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())


def test_the_rate_given_is_the_rate_used():
    config, batch = dropless("dense"), random_batch(8, 12)
    model = build(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=99.0)
    train_step(model, optimizer, batch, TrainConfig(batch_size=8), 0.25, isolate=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]


def tbptt_gradients(config, batch, windows, *, micro=None, isolate=True, state=None):
    model = build(config).double().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train = TrainConfig(batch_size=8, micro_batch_size=micro, clip_norm=1e12, tbptt=windows)
    sgd = torch.optim.SGD(model.parameters())
    result = train_step(model, sgd, batch, train, 1.0, isolate=isolate, state=state)
    return result, {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("name", list(PATTERNS))
def test_windows_add_up_to_full_back_propagation(name, micro, isolate):
    """Nothing is truncated inside a step."""
    batch, config = random_batch(8, 12), dropless(name)
    whole, expected = gradients(config, batch, None, isolate=isolate)
    parts, found = tbptt_gradients(config, batch, 4, micro=micro, isolate=isolate)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.lm, whole.lm, rtol=0, atol=1e-12)
    for layer, stats in whole.routers.items():
        assert torch.equal(parts.routers[layer].load, stats.load)


@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_a_step_goes_on_from_the_state_of_the_one_before(name):
    config, batch = dropless(name), random_batch(8, 24)
    first, second = (Batch(*(array[:, part] for array in batch)) for part in (slice(0, 12), slice(12, 24)))
    start, _ = tbptt_gradients(config, first, 2, micro=4)
    assert start.state is not None
    assert not any(leaf.requires_grad for layer in start.state for leaf in layer)
    found, _ = tbptt_gradients(config, second, 3, micro=2, state=start.state)
    model = build(config).double().train()
    whole = model(torch.from_numpy(batch.ids), segments=segments(batch, 0, 8)).logits[:, 12:]
    targets = torch.from_numpy(second.targets)
    expected = torch.nn.functional.cross_entropy(whole.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found.lm, expected.detach(), rtol=0, atol=1e-12)
    alone, _ = tbptt_gradients(config, second, 3)
    assert abs(float(alone.lm - found.lm)) > 1e-9
