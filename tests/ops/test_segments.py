"""Segments: padding, starts, slices, constructors, and that models keep documents and rows apart."""

import pytest
import torch

from ssmoe.config.model import MoEConfig
from ssmoe.model.build import build
from ssmoe.model.feedforwards.router import Router
from ssmoe.model.lm import LM
from ssmoe.ops import Segments
from tests.model.zoo import small

SEGMENTS = Segments(
    torch.tensor([[0, 0, 1, -1]], dtype=torch.int32), torch.tensor([[True, False, True, True]])
)


def test_real_is_what_is_not_padding() -> None:
    assert SEGMENTS.real.tolist() == [[True, True, True, False]]


def test_a_start_on_padding_resets_nothing() -> None:
    assert SEGMENTS.resets.tolist() == [[True, False, True, False]]


def test_slice_takes_columns_of_both() -> None:
    piece = SEGMENTS.slice(1, 3)
    assert piece.ids.tolist() == [[0, 1]]
    assert piece.starts.tolist() == [[False, True]]


def test_ragged_rows_pad_on_either_side() -> None:
    right = Segments.ragged([3, 0, 2])
    assert right.real.tolist() == [[True] * 3, [False] * 3, [True, True, False]]
    assert not right.starts.any()
    left = Segments.ragged(torch.tensor([1, 3]), length=4, side="left")
    assert left.ids.tolist() == [[-1, -1, -1, 0], [-1, 0, 0, 0]]


def test_a_padding_mask_is_its_own_ragged_batch() -> None:
    for side in ("left", "right"):
        wanted = Segments.ragged([3, 1, 4], side=side)
        for mask in (wanted.real, wanted.real.to(torch.int64)):
            found = Segments.padded(mask).check()
            assert torch.equal(found.ids, wanted.ids)
            assert torch.equal(found.starts, wanted.starts)
    assert Segments.padded(torch.tensor([[False, True, False]])).ids.tolist() == [[-1, 0, -1]]


def test_packed_rows_number_and_start_their_documents() -> None:
    found = Segments.packed([[2, 1], [4]], length=5).check()
    assert found.ids.tolist() == [[0, 0, 1, -1, -1], [0, 0, 0, 0, -1]]
    assert found.starts.tolist() == [[True, False, True, False, False], [True] + [False] * 4]
    going = Segments.packed([[2, 1]], continues=True).check()
    assert going.starts.tolist() == [[False, False, True]]


def test_an_end_token_opens_documents_and_may_pad() -> None:
    ids = torch.tensor([[9, 1, 9, 2], [1, 9, 9, 3], [9, 9, 9, 4]])
    found = Segments.opened_by(9, ids).check()
    assert found.ids.tolist() == [[0, 0, 1, 1], [0, 1, 2, 2], [0, 1, 2, 2]]
    assert found.starts.tolist() == (ids == 9).tolist()
    masked = Segments.opened_by(9, ids, mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]))
    assert masked.check().ids.tolist()[2] == [-1, -1, 0, 0]
    assert masked.resets[2].tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Segments.ragged([3, -1]), "do not lie between 0 and the row length 3"),
        (lambda: Segments.ragged([3, 5], length=4), "row length 4"),
        (lambda: Segments.ragged([]), "one a row"),
        (lambda: Segments.ragged([1.5]), "whole numbers"),
        (lambda: Segments.padded(torch.tensor([[1, 0, 1]])), "row 0 .* padding between its tokens"),
        (lambda: Segments.padded(torch.tensor([[0, 2]])), "true and false"),
        (lambda: Segments.padded(torch.tensor([[0.0, -1e9]])), "true and false"),
        (lambda: Segments.packed([[2, 0]]), "at least one token"),
        (lambda: Segments.packed([]), "at least one token"),
        (lambda: Segments.packed([[2], [3, 3]], length=5), "row 1 holds 6 tokens, more than 5"),
        (lambda: Segments.opened_by(0, torch.zeros(1, 3), mask=torch.ones(1, 2)), "mask has shape"),
        (lambda: Segments(torch.zeros(1, 3), torch.zeros(1, 2)).check(), r"ids \(1, 3\) and starts \(1, 2\)"),
        (lambda: Segments(torch.zeros(1, 3), torch.zeros(1, 3)).check(), "int32 and bool"),
        (
            lambda: SEGMENTS._replace(starts=torch.zeros(1, 4, dtype=torch.bool)).check(),
            "row 0 changes document at position 2 without a start",
        ),
        (
            lambda: SEGMENTS._replace(starts=torch.ones(1, 4, dtype=torch.bool)).check(),
            "start at position 1 inside document 0",
        ),
    ],
)
def test_conflicting_input_is_refused(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def model_of(name: str) -> LM:
    """Weights far enough from zero that greedy tokens differ."""
    model = build(small(name, repeat=1, tied_embeddings=False), seed=3).double().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(25)
    return model


BATTERY = ["mamba", "mamba-wide-conv", "attention", "attention-no-rope", "moe-top2", "moe-mamba", "hybrid"]


@pytest.mark.parametrize("name", BATTERY)
@torch.no_grad()
def test_random_ragged_batches_give_solo_logits_and_greedy_tokens(name: str) -> None:
    """100 batches, padding on either side, filled with random ids."""
    model, generator = model_of(name), torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    for trial in range(100):
        rows = [draw(0, 61, 1, int(n)) for n in draw(1, 10, 3)]
        segments = Segments.ragged([row.shape[1] for row in rows], side="left" if trial % 2 else "right")
        ids = draw(0, 61, *segments.ids.shape)
        ids[segments.real] = torch.cat(rows, dim=1)[0]
        out = model(ids, segments=segments)
        token = model(ids, segments=segments, logits="last").logits.argmax(-1, keepdim=True)
        state = out.state
        for i, row in enumerate(rows):
            alone = model(row).logits
            torch.testing.assert_close(out.logits[i][segments.real[i]], alone[0], rtol=0, atol=1e-9)
        for _ in range(3):
            rows = [torch.cat((row, token[i : i + 1]), dim=1) for i, row in enumerate(rows)]
            out = model(token, state, logits="last")
            token, state = out.logits.argmax(-1, keepdim=True), out.state
            solo = [int(model(row, logits="last").logits.argmax()) for row in rows]
            assert token[:, 0].tolist() == solo


@pytest.mark.parametrize("name", [*BATTERY, "dense"])
@pytest.mark.parametrize("first", [True, False])
def test_a_packed_neighbour_changes_nothing(name: str, first: bool) -> None:
    """Logits, gradients and routing of one document whatever the other holds, before it or after it."""
    model, generator = model_of(name), torch.Generator().manual_seed(1)
    segments = Segments.packed([[7, 9]])
    own, other = (slice(7, 16), slice(0, 7)) if first else (slice(0, 7), slice(7, 16))
    ids = torch.randint(61, (1, 16), generator=generator)
    found = [_read(model, ids, segments, own)]
    ids = ids.clone()
    ids[:, other] = (ids[:, other] + 13) % 61
    found.append(_read(model, ids, segments, own))
    exact = not any(isinstance(layer, MoEConfig) for layer in model.config.layers)
    for a, b in zip(*found, strict=True):
        if exact or not a.is_floating_point():
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def _read(model: LM, ids: torch.Tensor, segments: Segments, own: slice) -> list[torch.Tensor]:
    """A document's logits, the gradients of their sum of squares, and where its tokens are routed."""
    routed: list[torch.Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [r.register_forward_hook(lambda _m, _a, out: routed.append(out.expert[own])) for r in routers]
    logits = model(ids, segments=segments).logits[:, own]
    for hook in hooks:
        hook.remove()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(
        logits.square().mean(), parameters, allow_unused=True, materialize_grads=True
    )
    return [logits.detach(), *gradients, *routed]
