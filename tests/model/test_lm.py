"""The model's own contract: logits and losses asked for, precision, refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmoe.config.layers import AttentionConfig
from ssmoe.config.load import preset
from ssmoe.data.packing import Batch
from ssmoe.model.build import build
from ssmoe.model.lm import LM
from ssmoe.ops import Segments
from ssmoe.ops.reference.cross_entropy import IGNORE
from ssmoe.training.captured import CapturedStep
from ssmoe.training.optimizer import build_optimizer, parameter_groups
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


@pytest.mark.parametrize("wide", [True, False])
def test_the_residual_stream_is_as_wide_as_asked_for(wide: bool) -> None:
    model, seen = build(small("hybrid", residual_float32=wide), dtype=torch.bfloat16), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    model(IDS)
    assert set(seen) == {torch.float32 if wide else torch.bfloat16}
    assert len(seen) == len(model.layers)


def test_whatever_stands_in_the_padding_is_not_read() -> None:
    model, segments = build(small("mamba")), Segments.ragged([3, 5])
    ids = IDS[:2, :5].clone()
    expected = model(ids, segments=segments).logits
    ids[0, 3:] = -1
    assert torch.equal(model(ids, segments=segments).logits, expected)


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


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (-1, "target -1 is outside the vocabulary of 61: .* -100 where nothing"),
        (61, "target 61 is outside the vocabulary"),
        (0.5, "targets are torch.float32: give token numbers in int64"),
    ],
)
def test_targets_that_name_no_token_are_refused(target: float, message: str, backend: str) -> None:
    targets = torch.full_like(IDS, -100, dtype=torch.int64 if isinstance(target, int) else torch.float32)
    targets[1, 2] = target
    with pytest.raises(ValueError, match=message):
        build(small("mamba"), backend=backend)(IDS, targets=targets)


def test_what_is_no_tensor_and_no_segments_is_refused() -> None:
    model = build(small("mamba"))
    with pytest.raises(TypeError, match="ids is a list: give a tensor"):
        model([[1, 2]])
    with pytest.raises(TypeError, match=r"segments is a Tensor: make it with .*Segments.packed, .padded"):
        model(IDS, segments=torch.ones_like(IDS))
    with pytest.raises(ValueError, match="batch=-1"):
        model.init_state(-1)


def test_a_model_cast_to_float16_says_what_it_computes_in() -> None:
    with pytest.raises(ValueError, match="float16 is no dtype to compute in: use"):
        build(small("mamba")).half()(IDS)


def test_a_state_of_another_model_is_refused() -> None:
    state = build(small("mamba", repeat=1)).init_state(3)
    with pytest.raises(ValueError, match="1 layers and the model 2"):
        build(small("mamba"))(IDS, state)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@torch.no_grad()
def test_a_state_kept_in_float32_is_read_in_the_compute_dtype(backend: str) -> None:
    wide = build(small("mamba"), backend=backend).eval()(IDS).state
    model = build(small("mamba"), backend=backend, dtype=torch.bfloat16).eval()
    narrow = tuple(layer._replace(conv=layer.conv.bfloat16()) for layer in wide)
    found, expected = (model(IDS[:, :1], state) for state in (wide, narrow))
    assert torch.equal(found.logits, expected.logits)
    assert [layer.conv.dtype for layer in found.state] == [torch.bfloat16] * len(wide)


@pytest.mark.parametrize("other", [{"d_state": 3}, {"dt_rank": 2}, {"d_conv": 3}, {"expand": 1.0}])
@torch.no_grad()
def test_neighbouring_mambas_of_two_sizes_decode_as_they_read(other: dict[str, float]) -> None:
    pattern = [{"kind": "mamba", "d_state": 5}, {"kind": "mamba", "d_state": 5, **other}]
    model = build(small("mamba", pattern=pattern)).double().eval()
    state, found = None, []
    for column in IDS.unbind(1):
        out = model(column.unsqueeze(1), state)
        found.append(out.logits)
        state = out.state
    torch.testing.assert_close(torch.cat(found, 1), model(IDS).logits, rtol=0, atol=1e-9)


def seen_too_early(model: LM, ids: torch.Tensor, t: int) -> tuple[float, float, float]:
    """What tokens from position t on do to what stands before them: the largest change of a logit in eval
    mode, and the largest gradient that the loss of earlier targets sends to them in training mode. Last, the
    change of logits from t on."""
    other = ids.clone()
    other[:, t:] = (other[:, t:] + 1) % 61
    model.eval()
    with torch.no_grad():
        change = (model(ids).logits.float() - model(other).logits.float()).abs().amax(dim=(0, 2))
    inputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: object, x: torch.Tensor) -> None:
        x.retain_grad()
        inputs.append(x)

    handle = model.embedding.register_forward_hook(keep)
    targets = ids.roll(-1, dims=1)
    targets[:, t:] = IGNORE
    model.train()(ids, targets=targets).loss.lm.backward()
    handle.remove()
    model.zero_grad(set_to_none=True)
    sent = inputs[0].grad
    assert sent[:, :t].abs().max() > 0
    return float(change[:t].max()), float(sent[:, t:].abs().max()), float(change[t:].max())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["mamba", "attention", "hybrid", "moe-fine"])
def test_no_token_is_seen_before_its_turn(name: str, backend: str) -> None:
    model = build(small(name), backend=backend)
    ids = torch.randint(61, (3, 40), generator=torch.Generator().manual_seed(0))
    for t in (1, 17, 39):
        early, sent, late = seen_too_early(model, ids, t)
        # another tile of a product may round otherwise, no more
        assert early < 1e-5
        assert sent == 0
        assert late > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pattern", ["mmmmmammmmmammmmm", "mememaememeaememe"])
def test_no_token_is_seen_before_its_turn_as_the_headline_trains(pattern: str) -> None:
    """After some replayed steps of Muon in bfloat16, at full width and length."""
    run = preset("moe-mamba-fine-25m")
    layers = {layer.kind: layer for layer in run.model.layers} | {"attention": AttentionConfig(num_heads=8)}
    kinds = {"m": "mamba", "e": "moe", "a": "attention"}
    chosen = tuple(layers[kinds[letter]] for letter in pattern)
    config = run.model.model_copy(update={"pattern": chosen, "repeat": 1})
    model = build(config, backend="triton", device="cuda", dtype=torch.bfloat16).train()
    step = CapturedStep(
        model, build_optimizer(parameter_groups(model), run.train, model.ops), run.train, isolate=False
    )
    generator = np.random.default_rng(0)
    for number in range(30):
        rows = generator.integers(0, 61, (8, 1025))
        rows[:, 600:900] = rows[:, 100:400]
        documents = np.zeros((8, 1024), np.int32)
        step(Batch(rows[:, :-1], rows[:, 1:], documents, documents > 0), 2e-3 * min(1, number / 10))
    ids = torch.from_numpy(generator.integers(0, 61, (8, 1024))).cuda()
    found = [seen_too_early(model, ids, t) for t in (1, 129, 500, 1023)]
    print(pattern, found)
    assert max(early for early, _, _ in found) == 0
    assert max(sent for _, sent, _ in found) == 0
    assert min(late for _, _, late in found) > 0.1
