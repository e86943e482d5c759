"""Reading prompts piece by piece through one graph: the loop anywhere, the graphs on a GPU."""

import pytest
import torch

from ssmoe.generation import engine, graph
from ssmoe.generation.engine import decode
from ssmoe.generation.pieces import Pieces
from ssmoe.generation.sampler import Sampling
from ssmoe.model.build import build
from tests.generation.test_engine import model_of
from tests.generation.test_graph import assert_states_close
from tests.model.zoo import small


def _capture(work, device):
    """Runs where a graph would be replayed, after the first run that a capture makes."""
    work()
    return work


@pytest.mark.parametrize("name", ["mamba", "moe-mamba"])
@torch.no_grad()
def test_pieces_are_the_whole(name):
    model = model_of(name)
    ids = torch.randint(60, (2, 23), generator=torch.Generator().manual_seed(0))
    whole = model(ids, logits="last")
    pieces, state, replayed = Pieces(model, _capture), None, []
    for begin in range(0, 23, 5):
        logits, state = pieces(ids[:, begin : begin + 5], state, None)
        replayed.append(pieces.copied(state) is not state)
    # the first begins, the second is only counted, the last is shorter
    assert replayed == [False, False, True, True, False]
    torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-9)
    assert_states_close(state, whole.state)


@torch.no_grad()
def test_a_copied_state_outlives_the_next_piece():
    model = model_of("mamba")
    ids = torch.randint(60, (1, 20), generator=torch.Generator().manual_seed(0))
    pieces, state = Pieces(model, _capture), model.init_state(1)
    for _ in range(3):
        _, state = pieces(ids, state, None)
    kept = pieces.copied(state)
    before = [leaf.clone() for layer in kept for leaf in layer]
    pieces(ids, state, None)
    assert all(torch.equal(a, b) for a, b in zip(before, [x for layer in kept for x in layer], strict=True))
    assert not torch.equal(kept[0][1], state[0][1])


@torch.no_grad()
def test_growing_states_and_padding_are_read_as_they_stand():
    model = model_of("hybrid")
    ids, state = torch.randint(60, (2, 4)), model.init_state(2)
    pieces = Pieces(model, _capture)
    for _ in range(3):
        _, state = pieces(ids, state, None)
        assert pieces.copied(state) is state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["mamba", "moe-mamba"])
def test_long_prompts_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 64)
    model = build(small(name), backend="triton", device="cuda", seed=1, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(60, (64 * 6 + 9,), generator=generator).tolist() for _ in range(2)]

    def run(by_graph):
        made = [[], []]
        end = decode(
            model,
            prompts,
            lambda row, token: made[row].append(token) is None,
            sampling=Sampling(0.0),
            max_new_tokens=8,
            graph=by_graph,
        )
        return made, end

    plain, end = run(False)
    for _ in range(2):
        made, graph_end = run(True)
        assert made == plain
        for mine, theirs in zip(graph_end.state, end.state, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert graph.runner(model).pieces._graph is not None
