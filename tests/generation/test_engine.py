import pytest
import torch

from ssmoe.generation import engine
from ssmoe.generation.engine import Continuation, decode, read
from ssmoe.generation.sampler import Sampling, sample
from ssmoe.model.build import build
from tests.model.zoo import PATTERNS, small

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [60, 0, 60, 0], [33, 3]]
GREEDY = Sampling(0.0)


def model_of(name, *, dtype=torch.float64, **changes):
    """Weights far enough from zero that the tokens do not settle on one."""
    config = small(name, repeat=1, tied_embeddings=False, **changes)
    model = build(config, seed=3).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.ndim < 2 else 2)
        model.embedding.weight.mul_(25)
    return model


def run(model, prompts, count, *, sampling=GREEDY, start=None, stop_at=None):
    """Tokens a row, and where generation stopped."""
    made = [[] for _ in prompts]

    def accept(row, token):
        made[row].append(token)
        return stop_at is None or token not in stop_at

    end = decode(model, prompts, accept, sampling=sampling, max_new_tokens=count, start=start)
    return made, end


def assert_close(left, right):
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", list(PATTERNS))
@torch.no_grad()
def test_greedy_equals_repeated_full_forward(name):
    model = model_of(name)
    [tokens], end = run(model, [PROMPTS[0]], 64)
    text = list(PROMPTS[0])
    for token in tokens:
        state = None
        out = model(torch.tensor([text]), logits="last")
        state = out.state
        assert token == int(out.logits.argmax())
        text.append(token)
    assert len(tokens) == 64
    assert len(set(tokens)) > 3
    assert end.tokens == (len(text) - 1,)
    assert end.pending == ((text[-1],),)
    assert_close(end.state, state)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.5, seed=4), Sampling(1.2, top_k=9, top_p=0.9)])
@pytest.mark.parametrize("name", ["moe-top2", "moe-mamba", "hybrid", "attention-no-rope"])
def test_a_row_of_a_ragged_batch_is_the_row_alone(name, sampling):
    model = model_of(name)
    together, end = run(model, PROMPTS, 12, sampling=sampling)
    for i, prompt in enumerate(PROMPTS):
        [alone], alone_end = run(model, [prompt], 12, sampling=sampling)
        assert together[i] == alone
        assert end.tokens[i] == alone_end.tokens[0]
        assert end.pending[i] == alone_end.pending[0]


def test_the_order_of_rows_changes_nothing():
    model, sampling = model_of("hybrid"), Sampling(1.0, seed=1)
    forward, _ = run(model, PROMPTS, 10, sampling=sampling)
    backward, _ = run(model, PROMPTS[::-1], 10, sampling=sampling)
    assert forward == backward[::-1]


def test_a_seed_is_a_text():
    model = model_of("moe-mamba")
    texts = [run(model, PROMPTS[:1], 20, sampling=Sampling(1.0, seed=seed))[0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=2)])
@pytest.mark.parametrize("name", list(PATTERNS))
def test_continuing_is_bit_equal_to_never_having_stopped(name, sampling):
    """In float32 too: the same cuts are the same arithmetic."""
    model = model_of(name, dtype=torch.float32)
    prompts = [PROMPTS[0], PROMPTS[4] + [8]]
    whole, whole_end = run(model, prompts, 30, sampling=sampling)
    first, middle = run(model, prompts, 10, sampling=sampling)
    second, end = run(model, [[], []], 20, sampling=sampling, start=middle)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert (end.tokens, end.pending) == (whole_end.tokens, whole_end.pending)
    for one, other in zip(end.state, whole_end.state, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_rows_that_stop_early_keep_the_state_they_stopped_in():
    model = model_of("hybrid")
    whole, _ = run(model, PROMPTS, 24)
    stop_at = {whole[1][5], whole[3][9]}
    made, end = run(model, PROMPTS, 24, stop_at=stop_at)
    lengths = [next((i for i, t in enumerate(row) if t in stop_at), 23) + 1 for row in whole]
    assert made == [row[:n] for row, n in zip(whole, lengths, strict=True)]
    assert len(set(lengths)) > 1
    more, _ = run(model, [[] for _ in PROMPTS], 5, start=end)
    for i, prompt in enumerate(PROMPTS):
        [alone], _ = run(model, [prompt], lengths[i] + 5)
        assert made[i] + more[i] == alone


def test_a_text_after_a_continuation_is_read_after_what_is_pending():
    model = model_of("hybrid")
    [made], end = run(model, PROMPTS[:1], 6)
    [more], _ = run(model, [[4, 5]], 6, start=end)
    [expected], _ = run(model, [PROMPTS[0] + made + [4, 5]], 6)
    assert more == expected


def test_long_prompts_are_read_in_pieces(monkeypatch):
    model = model_of("hybrid")
    expected, _ = run(model, PROMPTS, 8)
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 2)
    assert run(model, PROMPTS, 8)[0] == expected


def test_each_row_is_asked_in_order_and_the_last_answer_may_be_ignored():
    model, asked = model_of("dense"), []

    def accept(row, token):
        asked.append(row)
        return True

    decode(model, PROMPTS[:3], accept, sampling=GREEDY, max_new_tokens=2)
    assert asked == [0, 1, 2, 0, 1, 2]


def test_a_prompt_without_tokens_is_refused():
    model = model_of("dense")
    with pytest.raises(ValueError, match="no tokens"):
        run(model, [[1], []], 3)
    with pytest.raises(ValueError, match="no tokens"):
        run(model, [[]], 3, start=Continuation(model.init_state(1), (0,), ((),)))


def test_sampling_counts_positions_from_the_start_of_the_text():
    model, sampling = model_of("moe-mamba"), Sampling(1.0, seed=9)
    [tokens], _ = run(model, PROMPTS[:1], 1, sampling=sampling)
    with torch.no_grad():
        logits = model(torch.tensor(PROMPTS[:1]), logits="last").logits
    assert tokens == sample(logits, [len(PROMPTS[0])], sampling)


@pytest.mark.parametrize("name", ["hybrid", "moe-mamba", "attention"])
def test_reading_first_and_then_generating_is_generating(name):
    """Also for a row of one token, which has nothing to read yet."""
    model = model_of(name)
    whole, _ = run(model, PROMPTS, 12)
    start = read(model, PROMPTS)
    assert start.pending == tuple((prompt[-1],) for prompt in PROMPTS)
    assert start.tokens == tuple(len(prompt) - 1 for prompt in PROMPTS)
    found, _ = run(model, [[] for _ in PROMPTS], 12, start=start)
    assert found == whole
    further = read(model, [[4, 5] for _ in PROMPTS], start=start)
    [expected], _ = run(model, [[*PROMPTS[1], 4, 5]], 5)
    assert run(model, [[] for _ in PROMPTS], 5, start=further)[0][1] == expected


def test_pieces_double_where_they_may():
    ends = [(1, [1]), (2048, [2048]), (3000, [2048, 3000]), (10_000, [8192, 10_000])]
    assert all(engine._ends(length, 16384) == right for length, right in ends)
    assert engine._ends(40_000, 16384) == [16384, 32768, 36864, 38912, 40_000]
    assert engine._ends(5000, 2048) == engine._ends(5000, 100) == [2048, 4096, 5000]
