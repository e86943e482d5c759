import pytest
import torch
from torch import nn

from ssmoe.data.prepare import prepare
from ssmoe.model.build import build
from ssmoe.model.feedforwards.router import Router
from ssmoe.training import loop
from ssmoe.training.loop import train
from ssmoe.training.metrics import TIMES, read_metrics
from ssmoe.training.recompute import recompute_layers
from tests.model.zoo import PATTERNS, small
from tests.ops.test_triton_interpreter import interpreted


def gradients(name, *, recompute, tied=False):
    """Loss, loads and float64 gradients of one batch; `tied`: every router gives every expert one score."""
    model = build(small(name), seed=3).double().train()
    if tied:
        for module in model.modules():
            if isinstance(module, Router):
                nn.init.zeros_(module.weight)
    if recompute:
        recompute_layers(model)
    ids = torch.randint(60, (8, 13), generator=torch.Generator().manual_seed(0))
    out = model(ids[:, :-1], targets=ids[:, 1:])
    out.loss.total.backward()
    loads = [stats.load.tolist() for stats in out.stats if stats is not None]
    return out.loss.total.detach(), loads, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", list(PATTERNS))
def test_gradients_are_those_of_keeping_everything(name, tied):
    loss, loads, expected = gradients(name, recompute=False, tied=tied)
    again, same_loads, found = gradients(name, recompute=True, tied=tied)
    assert torch.equal(loss, again)
    assert loads == same_loads
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (gradient is None) == (found[key] is None)
        if gradient is not None:
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-12)


def test_a_router_draws_the_same_noise_again():
    pattern = [{**layer.model_dump(), "jitter": 0.5} for layer in small("moe").pattern]
    ids = torch.randint(60, (8, 13), generator=torch.Generator().manual_seed(0))
    found = []
    for recompute in (False, True):
        model = build(small("moe", pattern=pattern), seed=3).double().train()
        if recompute:
            recompute_layers(model)
        torch.manual_seed(0)
        model(ids[:, :-1], targets=ids[:, 1:]).loss.total.backward()
        found.append([p.grad for p in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-12)


def saved_bytes(name, *, recompute):
    """What autograd keeps of a forward pass, parameters aside."""
    model = build(small(name, repeat=4), seed=3).train()
    if recompute:
        recompute_layers(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(60, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(ids, targets=ids)
        return sum(kept.values()), out


@pytest.mark.parametrize("name", ["mamba", "moe"])
def test_less_is_kept(name):
    kept, _ = saved_bytes(name, recompute=False)
    less, _ = saved_bytes(name, recompute=True)
    assert less < 0.6 * kept


def test_a_run_with_recomputation_is_the_run_without(tiny_run, tmp_path, monkeypatch):
    lines, recomputed = [], []

    def note(model):
        recomputed.append(model)
        recompute_layers(model)

    monkeypatch.setattr(loop, "recompute_layers", note)
    for recompute in ("false", "true"):
        run = tiny_run(f"train.recompute={recompute}")
        folder = tmp_path / recompute
        assert train(
            run,
            folder,
            prepare(run.data),
            evaluate=lambda _: {"held_out_loss": 1.0, "held_out_bits_per_byte": 1.0},
        )
        lines.append([{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(folder)])
    assert lines[0] == lines[1]
    assert len(recomputed) == 1


TRITON = """
import torch
from ssmoe.model.build import build
from ssmoe.training.recompute import recompute_layers
from tests.model.zoo import small

def gradients(recompute):
    model = build(small("moe-mamba", repeat=1), backend="triton", seed=0).train()
    if recompute:
        recompute_layers(model)
    ids = torch.randint(60, (2, 6), generator=torch.Generator().manual_seed(0))
    model(ids, targets=ids).loss.total.backward()
    return {name: p.grad for name, p in model.named_parameters()}

torch.testing.assert_close(gradients(True), gradients(False))
"""


@pytest.mark.slow
def test_the_triton_kernels_can_be_recomputed():
    """In the interpreter; a kernel that asks twice for what it saved cannot be."""
    pytest.importorskip("triton", reason="the Triton interpreter needs triton: pip install triton")
    interpreted("-c", TRITON)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["mamba", "moe", "moe-fine"])
def test_a_gpu_recomputes_the_same_gradients_in_less_memory(name):
    ids = torch.randint(60, (16, 256), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    found, peaks = [], []
    for recompute in (False, True):
        model = build(small(name, repeat=4), device="cuda", seed=3).train()
        if recompute:
            recompute_layers(model)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(ids, targets=ids).loss.total.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append({key: p.grad for key, p in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert peaks[1] < peaks[0]
