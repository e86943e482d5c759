"""Reading prompts piece by piece through one graph: the loop anywhere, the graphs on a GPU."""

import pytest
import torch

from ssmoe.generation import engine, graph
from ssmoe.generation import pieces as pieces_module
from ssmoe.generation.engine import decode
from ssmoe.generation.pieces import Pieces, rounded
from ssmoe.generation.sampler import Sampling
from ssmoe.model.build import build
from ssmoe.model.mixers.attention import AttentionState
from ssmoe.ops import Segments
from tests.generation.test_engine import model_of
from tests.generation.test_graph import assert_states_close
from tests.model.zoo import small


def _capture(work, device):
    """Runs where a graph would be replayed, after the first run that a capture makes."""
    work()
    return work


@pytest.fixture(params=[0, pieces_module.ROUNDED], ids=["as they are", "padded"])
def padding(request, monkeypatch):
    monkeypatch.setattr(pieces_module, "ROUNDED", request.param)
    return request.param > 0


def _ids(rows, length, seed=0):
    return torch.randint(60, (rows, length), generator=torch.Generator().manual_seed(seed))


def _read(pieces, ids, cut, segments=None):
    """All of `ids` piece by piece: logits, state, and for each piece whether a graph read it."""
    state, logits, replayed = None, None, []
    for begin in range(0, ids.shape[1], cut):
        part = None if segments is None else segments.slice(begin, begin + cut)
        logits, state = pieces(ids[:, begin : begin + cut], state, part)
        replayed.append(pieces.copied(state) is not state)
    return logits, pieces.copied(state), replayed


@pytest.mark.parametrize("name", ["mamba", "moe-mamba", "mamba-learned-state"])
@torch.no_grad()
def test_pieces_are_the_whole(name, padding):
    model, pads = model_of(name), padding and name != "mamba-learned-state"
    pieces = Pieces(model, _capture)
    for time in range(3):
        ids = _ids(2, 23, time)
        whole = model(ids, logits="last")
        logits, state, replayed = _read(pieces, ids, 5)
        # the first begins, the second is only counted, the last is shorter
        first = [False, False, True, True, pads]
        assert replayed == (first, [True] * 5, [True] * 5)[time]
        torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-9)
        assert_states_close(state, whole.state)


@pytest.mark.parametrize("name", ["mamba", "moe-mamba", "mamba-learned-state"])
@torch.no_grad()
def test_ragged_pieces_are_the_whole(name, padding):
    model, pieces, fits = model_of(name), Pieces(model_of(name), _capture), name != "mamba-learned-state"
    for time, lengths in enumerate([(23, 4, 17), (3, 23, 11), (23, 1, 1)]):
        ids, segments = _ids(3, 23, time), Segments.ragged(lengths)
        whole = model(ids, None, segments, logits="last")
        _, state, replayed = _read(pieces, ids, 12, segments)
        # the second piece is shorter and goes on; padded, it is as long
        assert replayed == [fits and time > 0] * 2
        assert_states_close(state, whole.state)


@torch.no_grad()
def test_prompts_of_like_lengths_share_a_graph():
    model, recorded = model_of("mamba"), []

    def capture(work, device):
        recorded.append(work)
        return _capture(work, device)

    pieces = Pieces(model, capture)
    for length in (65, 100, 128, 127, 66):
        ids = _ids(1, length)
        logits, state = pieces(ids, None, None)
        whole = model(ids, logits="last")
        torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-9)
        assert_states_close(state, whole.state)
    # 128 has no padding, which is a graph of its own and came once
    assert len(recorded) == 1


def test_lengths_are_rounded_up():
    lengths = [2, 64, 65, 512, 513, 1025, 1280, 1281, 2048]
    assert [rounded(n) for n in lengths] == [64, 64, 128, 512, 640, 1280, 1280, 1536, 2048]


@torch.no_grad()
def test_a_new_graph_leaves_the_state_of_others_alone():
    model, pieces = model_of("mamba"), Pieces(model_of("mamba"), _capture)
    ids = _ids(1, 10 * 64)
    # ends in the state that the graph of 64 shares with the one of 128 recorded from it
    order, state, begin = [64, 64, 128, 128, 64, 128], model.init_state(1), 0
    for length in order:
        logits, state = pieces(ids[:, begin : begin + length], state, None)
        begin += length
    whole = model(ids[:, :begin], logits="last")
    torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-9)
    assert_states_close(state, whole.state)
    assert len({id(graph.state) for graph in pieces._graphs.values()}) == 1


@torch.no_grad()
def test_few_graphs_are_kept(monkeypatch):
    monkeypatch.setattr(pieces_module, "KEPT", 2)
    model, pieces = model_of("mamba"), Pieces(model_of("mamba"), _capture)
    for rows in (1, 1, 2, 2, 3, 3, 1, 1, 4, 5, 6, 4):
        ids = _ids(rows, 64, rows)
        torch.testing.assert_close(
            pieces(ids, None, None)[0], model(ids, logits="last").logits, rtol=0, atol=1e-9
        )
    # 4 came too long ago to be remembered
    assert [shape.rows for shape in pieces._graphs] == [3, 1]
    assert [shape.rows for shape in pieces._seen] == [6, 4]


@torch.no_grad()
def test_a_copied_state_outlives_the_next_piece():
    model = model_of("mamba")
    ids = _ids(1, 20)
    pieces, state = Pieces(model, _capture), model.init_state(1)
    for _ in range(3):
        _, state = pieces(ids, state, None)
    kept = pieces.copied(state)
    before = [leaf.clone() for layer in kept for leaf in layer]
    pieces(ids, state, None)
    assert all(torch.equal(a, b) for a, b in zip(before, [x for layer in kept for x in layer], strict=True))
    assert not torch.equal(kept[0][1], state[0][1])


@torch.no_grad()
def test_where_a_state_grows_the_first_piece_is_recorded(monkeypatch):
    monkeypatch.setattr(pieces_module, "MOST", 100)
    model, pieces = model_of("hybrid"), Pieces(model_of("hybrid"), _capture)
    for length, first in ((20, True), (40, True), (20, True), (61, True), (101, False)):
        for time in range(3):
            ids = _ids(1, length + 7, time)
            _, state = pieces(ids[:, :length], None, None)
            assert (pieces.copied(state) is not state) == (first and time > 0) or length == 20
            logits, state = pieces(ids[:, length:], pieces.copied(state), None)
            whole = model(ids, logits="last")
            torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-9)
            assert_states_close(state, whole.state)
    # 20 was used after 40, which had to make room for 61
    assert [shape.length for shape in pieces._graphs] == [20, 61]


@torch.no_grad()
def test_other_pieces_are_read_as_they_stand(monkeypatch):
    monkeypatch.setattr(pieces_module, "MOST", 100)
    cases = (("mamba", 101, False), ("hybrid", 40, True), ("s4d", 40, False), ("mamba", 1, True))
    for name, length, goes_on in cases:
        model, ids = model_of(name), _ids(1, length)
        pieces, state = Pieces(model, _capture), model.init_state(1) if goes_on else None
        for _ in range(3):
            _, end = pieces(ids, state, None)
            assert pieces.copied(end) is end


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["mamba", "moe-mamba", "hybrid"])
def test_prompts_on_a_gpu(name, ragged, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 64)
    model = build(small(name), backend="triton", device="cuda", seed=1, dtype=torch.float32).eval()
    lengths = (64 * 6 + 9, 64 * 5 + 30 if ragged else 64 * 6 + 9)
    prompts = [_ids(1, n, n)[0].tolist() for n in lengths]

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
    for _ in range(3):
        made, graph_end = run(True)
        assert made == plain
        for mine, theirs in zip(graph_end.state, end.state, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                if isinstance(mine, AttentionState) and a.ndim == 4:
                    used = int(mine.length.max())
                    a, b = a[:, :, :used], b[:, :, :used]
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    # 256 tokens first, 128 that go on, and the rest
    kept = len(graph.runner(model).pieces._graphs)
    assert kept == ((0 if ragged else 1) if name == "hybrid" else 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_graphs_of_pieces_share_their_memory():
    model = build(small("mamba", d_model=256), backend="triton", device="cuda", seed=1, dtype=torch.float32)
    pieces = graph.runner(model.eval()).pieces

    def held_by(rows):
        ids = _ids(rows, 2048).cuda()
        before = torch.cuda.memory_reserved()
        for _ in range(3):
            pieces(ids, None, None)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    torch.cuda.empty_cache()
    most = held_by(8)
    assert most > 8 * 2048 * 4 * 512 * 4
    assert sum(held_by(rows) for rows in (7, 6, 5, 4, 3)) < most / 2
