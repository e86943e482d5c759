"""Decoding by CUDA graphs: what refuses and what is equal without, anywhere; the graphs on a GPU."""

import pytest
import torch

from ssmoe.generation import graph
from ssmoe.generation.engine import decode, read
from ssmoe.generation.sampler import Sampling
from ssmoe.model.build import build
from tests.generation.test_engine import GREEDY, PROMPTS, model_of
from tests.model.zoo import PATTERNS, small

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


def run(model, prompts, count, *, sampling=GREEDY, stop_at=None, **options):
    made = [[] for _ in prompts]

    def accept(row, token):
        made[row].append(token)
        return stop_at is None or len(made[row]) < stop_at[row]

    end = decode(model, prompts, accept, sampling=sampling, max_new_tokens=count, **options)
    return made, end


def test_why_not_names_the_device():
    model = model_of("moe-mamba")
    assert "cpu" in graph.why_not(model)
    with pytest.raises(ValueError, match="graph=True: the model is on cpu"):
        run(model, PROMPTS, 2, graph=True)


@pytest.mark.parametrize("name", ["mamba", "attention", "moe-mamba", "hybrid", "s4d", "parallel"])
@torch.no_grad()
def test_a_token_in_place_is_a_token(name):
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
    for column in pieces.t():
        ordinary = model(column.unsqueeze(1), state, logits="last")
        state = ordinary.state
        out = model(column.unsqueeze(1), static, logits="last", in_place=True)
        torch.testing.assert_close(out.logits, ordinary.logits, rtol=0, atol=1e-9)
        for mine, returned in zip(static, out.state, strict=True):
            for place, leaf in zip(mine, returned, strict=True):
                assert place.data_ptr() == leaf.data_ptr()


def test_in_place_needs_a_state_and_one_position():
    model = model_of("mamba")
    ids = torch.tensor([[1, 2]])
    with torch.no_grad(), pytest.raises(ValueError, match="in_place needs"):
        model(ids, model.init_state(1), in_place=True)
    with pytest.raises(ValueError, match="no_grad"):
        model(ids[:, :1], model.init_state(1), in_place=True)


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
        for one, other in zip(end.state, alone_end.state, strict=True):
            for a, b in zip(one, other, strict=True):
                if a.ndim == 4:  # attention's room is that of the longest row
                    room = min(a.shape[2], b.shape[2])
                    assert torch.equal(a[i, :, :room], b[0, :, :room])
                else:
                    assert torch.equal(a[i], b[0])


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
@pytest.mark.parametrize("name", [name for name in CAPTURED if name in PATTERNS])
def test_graphs_make_the_tokens_of_the_ordinary_path(name, sampling):
    model, stop_at = on_gpu(name), [3, 40, 17, 1, 40]
    assert graph.why_not(model) is None
    for prompts in (PROMPTS, PROMPTS[:1]):
        plain, end = run(model, prompts, 40, sampling=sampling, stop_at=stop_at, graph=False)
        for _ in range(2):
            made, graph_end = run(model, prompts, 40, sampling=sampling, stop_at=stop_at, graph=True)
            assert made == plain
        assert graph_end.tokens == end.tokens
        assert graph_end.pending == end.pending
        for one, other in zip(graph_end.state, end.state, strict=True):
            for a, b in zip(one, other, strict=True):
                if a.ndim == 4 and type(one).__name__ == "AttentionState":
                    room = min(a.shape[2], b.shape[2])
                    a, b = a[:, :, :room], b[:, :, :room]
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    made, _ = run(model, PROMPTS, 40, sampling=sampling, stop_at=stop_at)
    _, half = run(model, PROMPTS, 1, sampling=sampling)
    assert [row[:1] for row in made] == [[p[0]] for p in half.pending]


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", ["mamba", "moe-mamba", "hybrid"])
def test_batch_invariance_on_a_gpu(name):
    model = on_gpu(name, dtype=torch.bfloat16)
    prompts = [[1 + (7 * i + j) % 60 for j in range(1 + i % 9)] for i in range(70)]
    together, end = run(model, prompts, 24, batch_invariant=True)
    again, _ = run(model, prompts, 24, batch_invariant=True)
    assert together == again
    for some in ([3], [65, 2, 40]):
        alone, alone_end = run(model, [prompts[i] for i in some], 24, batch_invariant=True)
        assert alone == [together[i] for i in some]
        for one, other in zip(end.state, alone_end.state, strict=True):
            for a, b in zip(one, other, strict=True):
                for place, i in enumerate(some):
                    if a.ndim == 4 and type(one).__name__ == "AttentionState":
                        room = min(a.shape[2], b.shape[2])
                        assert torch.equal(a[i, :, :room], b[place, :, :room])
                    else:
                        assert torch.equal(a[i], b[place])


@pytest.mark.gpu
@ON_GPU
def test_changed_weights_are_noticed():
    model = on_gpu("mamba", dtype=torch.bfloat16)
    first, _ = run(model, PROMPTS, 20)
    with torch.no_grad():
        model.head.weight.neg_()
    second, _ = run(model, PROMPTS, 20)
    assert first != second
    assert second == run(model, PROMPTS, 20, graph=False)[0]
