"""The model's own contract: logits and losses asked for, precision, refusals."""

import pytest
import torch
import torch.nn.functional as F

from ssmoe.model.build import build
from ssmoe.ops import Segments
from ssmoe.ops.reference.cross_entropy import IGNORE
from tests.model.zoo import small

IDS = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(0))


def test_last_logits_are_the_last_of_all() -> None:
    model = build(small("hybrid")).double().eval()
    everything, last = model(IDS).logits, model(IDS, logits="last").logits
    assert everything.shape == (3, 9, 61)
    torch.testing.assert_close(last, everything[:, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "head", [{"tied_embeddings": True}, {"tied_embeddings": False, "head_bias": True, "final_norm": False}]
)
def test_the_loss_is_cross_entropy_plus_the_routers(head: dict[str, bool]) -> None:
    model = build(small("moe-top2", **head)).double().train()
    targets = IDS.roll(-1, dims=1).clone()
    targets[:, -1] = IGNORE
    out = model(IDS, targets=targets)
    assert out.logits is None
    expected = F.cross_entropy(model(IDS).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(out.loss.lm, expected)
    balance = sum(s.balance for s in out.stats if s is not None)
    torch.testing.assert_close(out.loss.balance, balance)
    torch.testing.assert_close(out.loss.total, expected + balance)
    assert int(out.loss.tokens) == 24


def test_padding_is_not_predicted() -> None:
    model = build(small("mamba")).double()
    ids = torch.zeros(3, 9, dtype=torch.int32)
    ids[:, 6:] = -1
    padded = model(IDS, segments=Segments(ids, torch.zeros(3, 9, dtype=torch.bool)), targets=IDS).loss
    torch.testing.assert_close(padded.lm, model(IDS[:, :6], targets=IDS[:, :6]).loss.lm)
    assert int(padded.tokens) == 18


def test_every_parameter_gets_a_gradient() -> None:
    model = build(small("hybrid", tied_embeddings=False))
    model(IDS, targets=IDS).loss.total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_bfloat16_compute_keeps_float32_parameters_and_residual() -> None:
    model = build(small("hybrid"), dtype=torch.bfloat16)
    out = model(IDS)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert out.logits.dtype == torch.bfloat16
    exact = build(small("hybrid")).double()(IDS).logits
    assert (out.logits.double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_model_cast_to_bfloat16_still_runs() -> None:
    model = build(small("moe-mamba")).to(torch.bfloat16)
    protected = {n: p.dtype for n, p in model.named_parameters() if ".ssm." in n or ".router." in n}
    assert set(protected.values()) == {torch.float32}
    assert torch.isfinite(model(IDS, targets=IDS).loss.total)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, 61]]), "token id 61 is outside the vocabulary of 61"),
        (torch.tensor([[3, -1]]), "token id -1"),
        (torch.zeros(2, 0, dtype=torch.int64), r"shape \(2, 0\)"),
        (torch.zeros(2, dtype=torch.int64), r"shape \(2,\)"),
        (torch.zeros(2, 3), "ids are torch.float32"),
    ],
)
def test_ids_that_cannot_be_read_are_refused(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(small("mamba"))(ids)


# torch's own, from tracing any autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["mamba", "moe", "attention"])
def test_a_model_compiles_as_one_graph(name: str) -> None:
    model = build(small(name))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses, gradients = [], []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(IDS, targets=IDS).loss.total
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_what_forward_is_asked_for_must_fit() -> None:
    model = build(small("mamba"))
    with pytest.raises(ValueError, match="logits='first' is not one of: all, last"):
        model(IDS, logits="first")
    with pytest.raises(ValueError, match=r"targets has shape \(2, 3\), ids \(2, 4\)"):
        model(torch.zeros(2, 4, dtype=torch.int64), targets=torch.zeros(2, 3, dtype=torch.int64))


def test_a_state_of_another_model_is_refused() -> None:
    state = build(small("mamba", repeat=1)).init_state(3)
    with pytest.raises(ValueError, match="1 layers and the model 2"):
        build(small("mamba"))(IDS, state)
