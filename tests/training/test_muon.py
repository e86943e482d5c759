from copy import deepcopy

import pytest
import torch
from torch import nn

from ssmoe.training import muon as module
from ssmoe.training.muon import JORDAN, Muon

MATRICES = [(12, 20), (20, 12), (16, 16), (4, 30)]
TORCH = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def differentiate(found, seed):
    """The same gradients for equally shaped parameters, some of them small."""
    generator = torch.Generator().manual_seed(seed)
    for i, parameter in enumerate(found):
        gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** (1 - 2 * i)
        parameter.grad = gradient.to(parameter.dtype)


def test_matrices_are_updated_as_by_torch(monkeypatch):
    """Torch's class rounds to bfloat16 first; without that, both in float64, they are equal."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, theirs = ([nn.Parameter(p.detach().double()) for p in parameters(*MATRICES)] for _ in range(2))
    own = Muon([{"params": ours, "parts": 1, "weight_decay": 0.1}], lr=0.02, iteration=JORDAN)
    reference = torch.optim.Muon(theirs, **TORCH)
    for step in range(5):
        for optimizer, found in ((own, ours), (reference, theirs)):
            differentiate(found, step)
            optimizer.step()
    for one, other, start in zip(ours, theirs, parameters(*MATRICES), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        assert (one - start).abs().max() > 1e-2


def test_a_bank_is_its_experts_and_a_fused_projection_its_parts():
    (bank,), (fused,) = parameters((4, 6, 10)), parameters((18, 10), seed=1)
    experts = [nn.Parameter(matrix.clone()) for matrix in bank.detach()]
    parts = [nn.Parameter(matrix.clone()) for matrix in fused.detach().chunk(3)]
    together = Muon([{"params": [bank], "parts": 1}, {"params": [fused], "parts": 3}, {"params": []}], lr=0.1)
    apart = [Muon([{"params": [matrix], "parts": 1}], lr=0.1) for matrix in (*experts, *parts)]
    for step in range(3):
        differentiate([bank, fused], step)
        for matrix, gradient in zip(experts, bank.grad, strict=True):
            matrix.grad = gradient.clone()
        for matrix, gradient in zip(parts, fused.grad.chunk(3), strict=True):
            matrix.grad = gradient.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    torch.testing.assert_close(bank.detach(), torch.stack([m.detach() for m in experts]))
    torch.testing.assert_close(fused.detach(), torch.cat([m.detach() for m in parts]))


def test_the_op_is_told_each_groups_own_numbers():
    """And autograd of a change that the op made unseen."""
    found, seen = parameters((4, 6), (4, 6), (4, 6)), []
    optimizer = Muon(
        [
            {"params": found[:1], "parts": 1, "momentum": 0.5, "weight_decay": 0.3},
            {"params": found[1:2], "parts": 1, "weight_decay": 0.0, "lr": 0.2},
            {"params": found[2:], "parts": 1},
        ],
        lr=0.1,
        momentum=0.9,
        update=lambda *_, **options: seen.append((options["mu"], options["decay"], options["rate"])),
    )
    before = [parameter._version for parameter in found]
    differentiate(found[:2], 0)
    optimizer.step()
    assert seen == [(0.5, 0.3, 0.1), (0.9, 0.0, 0.2)]
    changed = [parameter._version > old for parameter, old in zip(found, before, strict=True)]
    assert changed == [True, True, False]


def test_a_group_has_a_momentum_of_its_own():
    ours, theirs = parameters((4, 6), (4, 6)), parameters((4, 6), (4, 6))
    both = Muon(
        [{"params": ours[:1], "parts": 1, "momentum": 0.5}, {"params": ours[1:], "parts": 1}],
        lr=0.1,
        momentum=0.9,
    )
    alone = [
        Muon([{"params": [p], "parts": 1}], lr=0.1, momentum=mu)
        for p, mu in zip(theirs, (0.5, 0.9), strict=True)
    ]
    for step in range(3):
        differentiate(ours, step)
        differentiate(theirs, step)
        for optimizer in (both, *alone):
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("at_once", [1, 300, 2**25])
def test_how_many_are_taken_at_once_changes_nothing(monkeypatch, at_once):
    shapes = [(12, 20), (3, 12, 20), (20, 12), (12, 20), (2, 12, 20)]
    whole, cut = parameters(*shapes), parameters(*shapes)
    for found, limit in ((whole, 2**25), (cut, at_once)):
        monkeypatch.setattr(module, "_AT_ONCE", limit)
        differentiate(found, 0)
        Muon([{"params": found, "parts": 1}], lr=0.1).step()
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other)


def test_the_rest_is_adamw():
    ours, theirs = parameters((8, 5), (7,)), parameters((8, 5), (7,))
    matrix = parameters((4, 4))[0]
    own = Muon(
        [{"params": [matrix], "parts": 1}, {"params": ours, "weight_decay": 0.3}],
        lr=0.01,
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, fused=True)
    for step in range(3):
        differentiate(ours, step)
        differentiate(theirs, step)
        differentiate([matrix], step)
        own.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    assert own.state[matrix].keys() == {"momentum"}
    assert len(own.param_groups) == 2


def test_the_update_has_the_root_mean_square_of_adamws():
    for shape in ((64, 96), (96, 64), (5, 32, 96)):
        (matrix,) = parameters(shape)
        before = matrix.detach().clone()
        differentiate([matrix], 0)
        Muon([{"params": [matrix], "parts": 1, "weight_decay": 0.0}], lr=0.5).step()
        size = (matrix.detach() - before).square().mean().sqrt() / 0.5
        assert 0.15 < float(size) < 0.25


def test_a_rate_in_a_tensor_gives_the_same():
    plain, held = parameters((3, 6, 10), (8, 8), (5,)), parameters((3, 6, 10), (8, 8), (5,))
    rate = torch.tensor(0.1)
    for found, lr in ((plain, 0.1), (held, rate)):
        optimizer = Muon(
            [
                {"params": found[:2], "parts": 1, "weight_decay": 0.2, "lr": lr},
                {"params": found[2:], "lr": lr},
            ],
            lr=0.5,
        )
        for step in range(2):
            differentiate(found, step)
            optimizer.step()
    for one, other in zip(plain, held, strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_without_a_gradient_stay():
    used, unused = parameters((4, 6), (4, 6))
    before = unused.detach().clone()
    optimizer = Muon([{"params": [used, unused], "parts": 1, "weight_decay": 0.5}], lr=0.1)
    differentiate([used], 0)
    optimizer.step()
    assert torch.equal(unused, before)
    assert unused not in optimizer.state
    used.grad = None
    optimizer.step()


def test_a_closure_is_called_with_gradients():
    (matrix,) = parameters((4, 6))
    optimizer = Muon([{"params": [matrix], "parts": 1}], lr=0.1)

    def closure():
        loss = matrix.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    optimizer.zero_grad()
    second = optimizer.step(closure)
    assert second < first


@pytest.mark.parametrize(("shape", "parts"), [((5,), 1), ((5, 4), 2), ((2, 4, 4), 2), ((2, 2, 2, 2), 1)])
def test_what_is_no_matrix_is_refused(shape, parts):
    with pytest.raises(ValueError, match="parts=0"):
        Muon([{"params": [nn.Parameter(torch.zeros(shape))], "parts": parts}], lr=0.1)


def test_a_transposed_parameter_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        Muon([{"params": [nn.Parameter(torch.zeros(3, 4).T)], "parts": 1}], lr=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_step_follows_the_rate():
    shapes = [(3, 24, 40), (40, 24), (7,)]
    plain = [nn.Parameter(p.detach().cuda()) for p in parameters(*shapes)]
    held = deepcopy(plain)
    rate = torch.tensor(0.0, device="cuda")

    def optimizer(found, lr):
        groups = [{"params": found[:2], "parts": 1, "lr": lr}, {"params": found[2:], "lr": lr}]
        built = Muon(groups, lr=0.1)
        for group in built.param_groups:
            group["capturable"] = True
        return built

    for found in (plain, held):
        for i, p in enumerate(found):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).cuda()
    eager, captured = optimizer(plain, 0.0), optimizer(held, rate)
    for _ in range(2):  # as many steps at rate zero before, so that the momenta are equal
        eager.step()
        captured.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for lr in (0.1, 0.01):
        rate.fill_(lr)
        graph.replay()
        for group in eager.param_groups:
            group["lr"] = lr
        eager.step()
    for one, other in zip(plain, held, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
