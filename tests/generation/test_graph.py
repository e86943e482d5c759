"""Decoding by CUDA graphs: what refuses and what is equal without, anywhere; the graphs on a GPU."""

import gc

import pytest
import torch

from ssmoe.generation import graph
from ssmoe.generation.engine import Continuation, decode, read
from ssmoe.generation.sampler import Sampling
from ssmoe.model.build import build
from ssmoe.model.mixers.attention import AttentionState
from ssmoe.model.state import select
from tests.generation.test_engine import GREEDY, PROMPTS, model_of
from tests.model.zoo import small
from tests.ops.test_triton_interpreter import interpreted

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CAPTURED = [
    "mamba",
    "attention",
    "attention-no-rope",
    "dense",
    "moe",
    "moe-top2",
    "moe-fine",
    "hybrid",
    "moe-mamba",
]


def run(model, prompts, count, *, sampling=GREEDY, stop_at=None, graph=False, **options):
    made = [[] for _ in prompts]

    def accept(row, token):
        made[row].append(token)
        return stop_at is None or len(made[row]) < stop_at[row]

    end = decode(model, prompts, accept, sampling=sampling, max_new_tokens=count, graph=graph, **options)
    return made, end


def test_why_not_names_the_device():
    model = model_of("moe-mamba")
    assert "cpu" in graph.why_not(model)
    with pytest.raises(ValueError, match="graph=True: the model is on cpu"):
        run(model, PROMPTS, 2, graph=True)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("name", ["mamba", "attention", "moe-mamba", "hybrid", "s4d", "parallel"])
@torch.no_grad()
def test_a_token_into_a_given_state_is_a_token(name, in_turn):
    model = model_of(name)
    read_to, pieces = torch.tensor([[5, 9, 2], [7, 1, 1]]), torch.tensor([[4, 8, 1], [3, 2, 60]])
    state = model(read_to, model.init_state(2), logits="last").state
    static = model.init_state(2, 16)
    for mine, theirs in zip(static, state, strict=True):
        for place, leaf in zip(mine, theirs, strict=True):
            (
                place[:, :, : leaf.shape[2]]
                if type(mine).__name__ == "AttentionState" and leaf.ndim == 4
                else place
            ).copy_(leaf)
    places = [static, tuple(graph._beside(layer) for layer in static) if in_turn else static]
    for turn, column in enumerate(pieces.t()):
        ordinary = model(column.unsqueeze(1), state, logits="last")
        old, new = places[turn % 2], places[1 - turn % 2]
        before = [leaf.clone() for leaf in own_leaves(old)]
        out = model(column.unsqueeze(1), old, logits="last", out_state=new)
        torch.testing.assert_close(out.logits, ordinary.logits, rtol=0, atol=1e-9)
        for mine, returned in zip(new, out.state, strict=True):
            for place, leaf in zip(mine, returned, strict=True):
                assert place.data_ptr() == leaf.data_ptr()
        assert_states_close(new, ordinary.state)
        if in_turn:
            assert all(torch.equal(a, b) for a, b in zip(before, own_leaves(old), strict=True))
        state = ordinary.state


def own_leaves(state):
    """All but the caches of attention, which are written past what has been read."""
    return [
        leaf for layer in state for leaf in layer if not isinstance(layer, AttentionState) or leaf.ndim < 4
    ]


def test_a_given_state_needs_a_state_and_one_position():
    model = model_of("mamba")
    ids, state = torch.tensor([[1, 2]]), model.init_state(1)
    with torch.no_grad(), pytest.raises(ValueError, match="out_state needs"):
        model(ids, state, out_state=state)
    with pytest.raises(ValueError, match="no_grad"):
        model(ids[:, :1], state, out_state=state)


def _run(work, device):
    """In place of a recording: runs once to compile, then whenever it is asked."""
    work()
    return work


@pytest.fixture
def without_a_gpu(monkeypatch):
    """The same code, but the step runs as it stands where a graph would be replayed."""

    def record(works, device):
        for work in works:
            work()
        return [lambda work=work: work() or (lambda: None) for work in works]

    monkeypatch.setattr(graph, "why_not", lambda model: None)
    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "Recorder", lambda: _run)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.2, seed=4), Sampling(1.2, top_k=9, top_p=0.9)])
@pytest.mark.parametrize("name", CAPTURED)
def test_the_loop_around_the_graph_makes_the_same_tokens(name, sampling, without_a_gpu):
    model, stop_at = model_of(name), [3, 20, 11, 1, 20]
    seeds = [9, 8, 7, 9, 5]
    plain, end = run(model, PROMPTS, 20, sampling=sampling, stop_at=stop_at, seeds=seeds)
    for _ in range(2):  # the second time with the graph of the first
        made, graph_end = run(model, PROMPTS, 20, sampling=sampling, stop_at=stop_at, seeds=seeds, graph=True)
        assert made == plain
    assert graph_end[1:] == end[1:]
    assert_states_close(graph_end.state, end.state)


def assert_states_close(one, other, within=1e-9):
    for mine, theirs in zip(one, other, strict=True):
        mine, theirs = (
            type(layer)(*(leaf.cpu() for leaf in layer)) if layer else () for layer in (mine, theirs)
        )
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(mine, AttentionState) and a.ndim == 4:
                room = min(a.shape[2], b.shape[2])
                assert int(mine.length.max()) <= room
                a, b = (
                    (t[:, :, :room] * (torch.arange(room) < mine.length[:, None])[:, None, :, None])
                    for t in (a, b)
                )
            torch.testing.assert_close(a, b, rtol=0 if within < 1e-6 else within, atol=within)


@torch.no_grad()
def test_a_step_begins_before_the_tokens_are_read_and_none_is_left_behind(without_a_gpu):
    model, done = model_of("hybrid"), []
    step = graph.runner(model).prepare(1, 64, GREEDY)
    for turn, launch in enumerate(step._launch):

        def noted(turn=turn, launch=launch):
            done.append(turn)
            wait = launch()
            return lambda: (done.append("end"), wait())

        step._launch[turn] = noted
    run(model, [[5]], 5, graph=True)
    assert done == [0, 1, "end", 0, "end", 1, "end", "end"]
    done.clear()
    run(model, [[5]], 9, stop_at=[2], graph=True)
    assert done == [0, 1, "end", "end"]
    done.clear()

    def stop(row, token):
        if done.count("end") == 2:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        decode(model, [[5]], stop, sampling=GREEDY, max_new_tokens=9, graph=True)
    assert done == [0, 1, "end", 0, "end", "end"]


@pytest.mark.parametrize("name", ["moe-mamba", "hybrid"])
def test_going_on_from_a_graph_is_not_having_stopped(name, without_a_gpu):
    model = model_of(name)
    whole, _ = run(model, PROMPTS, 30)
    first, middle = run(model, PROMPTS, 13, graph=True)
    rest, _ = run(model, [()] * 5, 17, start=middle, graph=True)
    assert [a + b for a, b in zip(first, rest, strict=True)] == whole
    # a short row from a state with room for long ones
    short = Continuation(select(middle.state, [1]), middle.tokens[1:2], middle.pending[1:2])
    made, _ = run(model, [()], 2, start=short, graph=True)
    assert made == [whole[1][13:15]]


def test_changed_weights_make_a_new_graph_and_old_ones_go(without_a_gpu):
    model = model_of("mamba")
    first, _ = run(model, PROMPTS, 20, graph=True)
    used = graph.runner(model)
    assert graph.runner(model) is used
    with torch.no_grad():
        model.layers[0].layer.in_proj.weight.neg_()
    second, _ = run(model, PROMPTS, 20, graph=True)
    assert graph.runner(model) is not used
    assert first != second
    assert second == run(model, PROMPTS, 20)[0]
    before = len(graph._runners)
    del model
    gc.collect()
    assert len(graph._runners) == before - 1


def test_a_trained_model_has_a_new_runner_though_its_optimiser_counts_no_version():
    model = model_of("mamba", dtype=torch.float32).eval()
    used = graph.runner(model)
    assert graph.runner(model.eval()) is used
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    ids = torch.tensor([[1, 2, 3]])
    model.train()(ids, targets=ids).loss.total.backward()
    versions = [parameter._version for parameter in model.parameters()]
    optimizer.step()
    assert [parameter._version for parameter in model.parameters()] == versions
    assert graph.runner(model.eval()) is not used


SYNCS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from ssmoe.generation import graph
from ssmoe.generation.sampler import Sampling
from ssmoe.model.build import build
from ssmoe.model.lm import LM
from tests.model.zoo import small

WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "bincount", "lift_fresh")

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in WAITS, f"{function} waits for the host"
        masks = [t for t in (args[1] if name == "index" else ()) if t is not None and t.dtype == torch.bool]
        assert not masks, "a bool index waits for the host"
        return function(*args, **(kwargs or {}))

graph.record = lambda works, device: works
LM._check = lambda *_: None  # on a GPU it looks at no id
for name in ("moe-mamba", "moe-fine", "hybrid"):
    model = build(small(name), backend="triton", seed=1, dtype=torch.bfloat16).eval()
    for sampling in (Sampling(0.0), Sampling(0.8, top_k=5, top_p=0.9)):
        step = graph.Step(graph.Runner(model).model, 2, 8, sampling)
        with torch.no_grad(), Watch():
            step._work(0)
        print(name, step.ids.flatten().tolist())
"""


@pytest.mark.slow
def test_no_captured_layer_waits_for_the_host():
    pytest.importorskip("triton", reason="the Triton interpreter needs triton: pip install triton")
    assert len(interpreted("-c", SYNCS).splitlines()) == 6


@pytest.mark.parametrize("name", ["moe-mamba", "hybrid", "s4d"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.5, seed=4)])
def test_batch_invariance_on_any_device(name, sampling):
    model = model_of(name, dtype=torch.float32)
    together, end = run(
        model, PROMPTS, 12, sampling=sampling, batch_invariant=True, stop_at=[3, 12, 7, 1, 12]
    )
    for i, prompt in enumerate(PROMPTS):
        [alone], alone_end = run(
            model, [prompt], 12, sampling=sampling, batch_invariant=True, stop_at=[[3, 12, 7, 1, 12][i]]
        )
        assert together[i] == alone
        assert end.tokens[i] == alone_end.tokens[0]
        assert end.pending[i] == alone_end.pending[0]
        assert_same_bits(end.state, alone_end.state, i)


def test_a_row_of_a_state_goes_on_as_if_alone():
    model = model_of("hybrid", dtype=torch.float32)
    start = read(model, PROMPTS, batch_invariant=True)
    together, end = run(model, [()] * 5, 9, start=start, batch_invariant=True)
    for i, prompt in enumerate(PROMPTS):
        own = read(model, [prompt], batch_invariant=True)
        [alone], alone_end = run(model, [()], 9, start=own, batch_invariant=True)
        assert together[i] == alone
        assert_same_bits(end.state, alone_end.state, i)


def assert_same_bits(state, alone, row):
    for one, other in zip(state, alone, strict=True):
        for a, b in zip(one, other, strict=True):
            # attention's room is that of the longest row
            room = min(a.shape[2], b.shape[2]) if isinstance(one, AttentionState) and a.ndim == 4 else None
            assert torch.equal(
                a[row] if room is None else a[row, :, :room], b[0] if room is None else b[0, :, :room]
            )


def test_reading_alone_is_reading_to_rounding():
    model = model_of("hybrid")
    alone, together = read(model, PROMPTS, batch_invariant=True), read(model, PROMPTS)
    assert alone.tokens == together.tokens
    assert alone.pending == together.pending
    a, b = run(model, [()] * 5, 6, start=alone), run(model, [()] * 5, 6, start=together)
    assert a[0] == b[0]


def test_narrowed_weights_change_no_token_and_share_the_rest():
    config = small("moe-mamba")
    model = build(config, seed=1, dtype=torch.bfloat16).eval()
    twin = graph.Runner(model).model
    assert twin is not model
    assert twin.embedding.weight is model.embedding.weight
    assert twin.layers[0].layer.in_proj.weight.dtype == torch.bfloat16
    assert twin.layers[0].layer.ssm.A_log is model.layers[0].layer.ssm.A_log
    assert model.layers[0].layer.in_proj.weight.dtype == torch.float32
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)


def on_gpu(name, dtype=None, **changes):
    """Weights far enough from zero that the tokens do not settle on one."""
    config = small(name, repeat=2, tied_embeddings=False, **changes)
    model = build(config, backend="triton", device="cuda", seed=3, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.ndim < 2 else 2)
        model.embedding.weight.mul_(25)
    return model


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.2, seed=4), Sampling(1.2, top_k=9, top_p=0.9)])
@pytest.mark.parametrize("name", CAPTURED)
def test_graphs_make_the_tokens_of_the_ordinary_path(name, sampling):
    model, stop_at = on_gpu(name), [3, 40, 17, 1, 40]
    assert graph.why_not(model) is None
    for prompts in (PROMPTS, PROMPTS[:1]):
        plain, end = run(model, prompts, 40, sampling=sampling, stop_at=stop_at)
        for _ in range(2):
            made, graph_end = run(model, prompts, 40, sampling=sampling, stop_at=stop_at, graph=True)
            assert made == plain
            assert graph_end[1:] == end[1:]
            assert_states_close(graph_end.state, end.state, within=1e-3)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", ["mamba", "moe-mamba", "hybrid"])
def test_batch_invariance_on_a_gpu(name):
    model = on_gpu(name, dtype=torch.bfloat16)
    prompts = [[1 + (7 * i + j) % 60 for j in range(1 + i % 9)] for i in range(7)]
    together, end = run(model, prompts, 24, batch_invariant=True, graph=True)
    again, _ = run(model, prompts, 24, batch_invariant=True, graph=True)
    assert together == again
    for i in (0, 3, 6):
        alone, alone_end = run(model, [prompts[i]], 24, batch_invariant=True, graph=True)
        assert alone == [together[i]]
        assert_same_bits(end.state, alone_end.state, i)


@pytest.mark.gpu
@ON_GPU
def test_changed_weights_are_noticed():
    model = on_gpu("mamba", dtype=torch.bfloat16)
    first, _ = run(model, PROMPTS, 20, graph=True)
    with torch.no_grad():
        model.head.weight.neg_()
    second, _ = run(model, PROMPTS, 20, graph=True)
    assert first != second
    assert second == run(model, PROMPTS, 20)[0]
