"""The layer contract: one battery over every layer kind and every tiny preset, in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ssmoe.model.build import build
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.ops import Segments
from tests.model.zoo import PATTERNS, mixing, small, tiny, tiny_presets

TOLERANCE = 1e-9


def make(name: str) -> LM:
    config = tiny(name) if name.endswith("-tiny") else small(name)
    return build(config, seed=1).double().eval()


ALL = [*PATTERNS, *tiny_presets()]


def draw(b: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(61, (b, length), generator=torch.Generator().manual_seed(seed))


def assert_states_close(found: State, expected: State) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs)
        for a, b in zip(ours, theirs, strict=True):
            if a.ndim == 4:  # keys and values: rows may have different room
                room = min(a.shape[2], b.shape[2])
                assert not a[:, :, room:].any() or not b[:, :, room:].any()
                a, b = a[:, :, :room], b[:, :, :room]
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def cuts(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randperm(length - 1, generator=generator)[:4].add(1).sort().values.tolist()
    return [0, *inner, length]


@torch.no_grad()
def run_in_chunks(
    model: LM, ids: Tensor, edges: list[int], state: State | None = None, segments: Segments | None = None
) -> tuple[Tensor, State]:
    parts: list[Tensor] = []
    for begin, end in pairwise(edges):
        piece = None if segments is None else segments.slice(begin, end)
        out = model(ids[:, begin:end], state, piece)
        assert out.logits is not None
        parts.append(out.logits)
        state = out.state
    assert state is not None
    return torch.cat(parts, dim=1), state


@pytest.mark.parametrize("name", ALL)
def test_chunks_equal_the_whole(name: str) -> None:
    model, ids = make(name), draw(2, 33)
    with torch.no_grad():
        whole = model(ids)
    for edges in (cuts(33, 0), cuts(33, 1), list(range(34))):
        logits, state = run_in_chunks(model, ids, edges)
        torch.testing.assert_close(logits, whole.logits, rtol=0, atol=TOLERANCE)
        assert_states_close(state, whole.state)


@pytest.mark.parametrize("name", ALL)
def test_the_zero_state_is_no_state(name: str) -> None:
    model, ids = make(name), draw(2, 9)
    with torch.no_grad():
        without, given = model(ids), model(ids, model.init_state(2, capacity=9))
    torch.testing.assert_close(given.logits, without.logits, rtol=0, atol=TOLERANCE)
    assert_states_close(given.state, without.state)


@pytest.mark.parametrize("name", ALL)
def test_a_row_equals_itself_alone(name: str) -> None:
    model, ids = make(name), draw(4, 21)
    with torch.no_grad():
        together = model(ids).logits
        for row in range(4):
            alone = model(ids[row : row + 1]).logits
            torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ALL)
def test_greedy_steps_equal_repeated_full_passes(name: str) -> None:
    model, prompt = make(name), draw(2, 5)
    stepped, repeated = prompt, prompt
    with torch.no_grad():
        out = model(prompt, model.init_state(2, capacity=69), logits="last")
        for _ in range(64):
            token = out.logits.argmax(-1, keepdim=True)
            stepped = torch.cat((stepped, token), dim=1)
            out = model(token, out.state, logits="last")
            full = model(repeated).logits[:, -1]
            repeated = torch.cat((repeated, full.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(stepped, repeated)


@pytest.mark.parametrize("name", ALL)
def test_the_future_changes_nothing(name: str) -> None:
    model, ids = make(name), draw(2, 20)
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 7) % 61
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    # an expert's matrix product rounds differently with other rows beside it
    torch.testing.assert_close(after[:, :12], before[:, :12], rtol=0, atol=1e-13)
    assert not torch.equal(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("name", ALL)
def test_packed_documents_equal_documents_alone(name: str) -> None:
    model, first, second = make(name), draw(1, 7, seed=1), draw(1, 9, seed=2)
    ids = torch.cat((first, second), dim=1)
    starts = torch.zeros(1, 16, dtype=torch.bool)
    starts[0, [0, 7]] = True
    documents = torch.tensor([[0] * 7 + [1] * 9], dtype=torch.int32)
    with torch.no_grad():
        packed = model(ids, segments=Segments(documents, starts))
        alone = [model(first), model(second)]
    expected = torch.cat([out.logits for out in alone], dim=1)
    torch.testing.assert_close(packed.logits, expected, rtol=0, atol=TOLERANCE)
    assert_states_close(packed.state, alone[1].state)
    chunked, state = run_in_chunks(model, ids, cuts(16, 3), segments=Segments(documents, starts))
    torch.testing.assert_close(chunked, expected, rtol=0, atol=TOLERANCE)
    assert_states_close(state, alone[1].state)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(name: str, side: str) -> None:
    model = make(name)
    rows = [draw(1, n, seed=n) for n in (3, 11, 8)]
    ids = draw(3, 11, seed=99)  # padding holds random ids
    documents = torch.full((3, 11), -1, dtype=torch.int32)
    for i, row in enumerate(rows):
        n = row.shape[1]
        place = slice(11 - n, 11) if side == "left" else slice(0, n)
        ids[i, place], documents[i, place] = row[0], 0
    segments = Segments(documents, torch.zeros(3, 11, dtype=torch.bool))
    with torch.no_grad():
        padded = model(ids, segments=segments)
        last = model(ids, segments=segments, logits="last").logits
        continued = model(draw(3, 4), padded.state).logits
    assert padded.logits is not None
    for i, row in enumerate(rows):
        with torch.no_grad():
            alone = model(row)
            further = model(draw(3, 4)[i : i + 1], alone.state).logits
        assert alone.logits is not None
        real = padded.logits[i][documents[i] >= 0]
        torch.testing.assert_close(real, alone.logits[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(last[i], alone.logits[0, -1], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(continued[i : i + 1], further, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", PATTERNS)
def test_gradients_flow_through_a_state(name: str) -> None:
    """The gradient of a loss on the second chunk with respect to all parameters, cut or whole."""
    model, ids = make(name), draw(2, 12)
    parameters = list(model.parameters())

    def gradient(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    whole = gradient(model(ids).logits[:, 7:].square().sum())
    cut = gradient(model(ids[:, 7:], model(ids[:, :7]).state).logits.square().sum())
    for a, b in zip(cut, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", PATTERNS)
def test_float32_follows_float64(name: str) -> None:
    """Reported beside float64: every token whose routing has no near-tie is close."""
    wide, ids = make(name), draw(2, 40)
    narrow = build(small(name), seed=1).eval()
    with torch.no_grad():
        difference = (narrow(ids).logits.double() - wide(ids).logits).abs()
    assert difference.max() < 1e-4


@pytest.mark.parametrize("name", [*PATTERNS, "mixing expert-choice", "mixing mot"])
def test_the_future_changes_nothing_in_training(name: str) -> None:
    """Capacity, expert choice by position and mixtures included: no later position has a say."""
    config = mixing(name.removeprefix("mixing ")) if name.startswith("mixing ") else small(name)
    model, ids = build(config, seed=1).double().train(), draw(6, 20)
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 7) % 61
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :12], before[:, :12], rtol=0, atol=1e-12)
    assert not torch.equal(before[:, 12:], after[:, 12:])
