import pytest
import torch

from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.generation.text import generate
from ssmoe.model.build import build
from tests.model.zoo import small

TOKENIZER = ByteTokenizer()


def writer(alphabet, end=False):
    """A model whose text is of the bytes of `alphabet`, about equally likely."""
    config = small("moe-mamba", repeat=1, vocab_size=257, tied_embeddings=False, head_bias=True)
    model = build(config, seed=1)
    assert model.head is not None
    with torch.no_grad():
        model.head.bias.fill_(-100)
        model.head.bias[list(alphabet.encode())] = 0
        if end:
            model.head.bias[256] = 0
    return model


LETTERS = writer("abcdefghijklmnop")


def text_of(model, prompt="x", **options):
    return generate(model, TOKENIZER, [prompt], **{"max_new_tokens": 60, **options}).texts[0]


def test_pieces_join_to_the_text():
    pieces = {0: [], 1: []}
    done = generate(
        LETTERS,
        TOKENIZER,
        ["one", "another one"],
        max_new_tokens=40,
        seed=3,
        stop=["no such text", "abc"],
        on_text=lambda row, piece: pieces[row].append(piece),
    )
    assert ["".join(pieces[row]) for row in (0, 1)] == done.texts
    assert [TOKENIZER.decode(tokens) for tokens in done.tokens] == done.texts
    assert done.reasons == ["length", "length"]
    assert len(pieces[0]) > 20


def test_characters_are_never_cut():
    """é is two tokens, and half of one is no text before it is known what follows."""
    model, pieces = writer("éa"), []
    done = generate(model, TOKENIZER, ["x"], max_new_tokens=80, on_text=lambda _, piece: pieces.append(piece))
    assert "".join(pieces) == done.texts[0] == TOKENIZER.decode(done.tokens[0])
    assert "é" in done.texts[0]


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_a_stop_string_is_never_shown_though_it_comes_a_letter_at_a_time(length):
    whole = text_of(LETTERS, seed=5)
    stop, shown = whole[20 : 20 + length], []
    done = generate(
        LETTERS,
        TOKENIZER,
        ["x"],
        max_new_tokens=60,
        seed=5,
        stop=["zzz", stop],
        on_text=lambda _, piece: shown.append(piece),
    )
    assert done.texts == [whole[: whole.find(stop)]]
    assert "".join(shown) == done.texts[0]
    assert done.reasons == ["stop"]
    assert len(done.tokens[0]) == whole.find(stop) + length


def test_the_beginning_of_a_stop_string_that_does_not_come_is_shown():
    whole = text_of(LETTERS, seed=5)
    done = generate(LETTERS, TOKENIZER, ["x"], max_new_tokens=60, seed=5, stop=[whole[-3:] + "!"])
    assert (done.texts, done.reasons) == ([whole], ["length"])


def test_a_stop_string_that_begins_like_itself_is_found():
    """After "aa" both letters may be the beginning of "aab"."""
    model, found = writer("ab"), 0
    for seed in range(8):
        whole = text_of(model, seed=seed)
        end = whole.find("aab")
        found += end >= 0
        assert text_of(model, seed=seed, stop=["aab"]) == (whole if end < 0 else whole[:end])
    assert found >= 4


def test_of_two_stop_strings_the_first_in_the_text_counts(monkeypatch):
    whole = text_of(LETTERS, seed=5)
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: "".join(f"<{i}|end>" for i in ids))
    for stop in (["|end", "end>"], ["end>", "|end"]):
        done = generate(LETTERS, TOKENIZER, ["x"], max_new_tokens=3, seed=5, stop=stop)
        assert done.texts == [f"<{ord(whole[0])}"]


def test_a_stop_string_may_come_with_other_text_in_one_token(monkeypatch):
    whole = text_of(LETTERS, seed=5)
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: "".join(f"<{i}|end>" for i in ids))
    done = generate(LETTERS, TOKENIZER, ["x"], max_new_tokens=3, seed=5, stop=["|end"])
    assert done.texts == [f"<{ord(whole[0])}"]


def test_the_end_token_ends_a_row_and_shows_nothing():
    model = writer("ab", end=True)
    done = generate(model, TOKENIZER, ["x", "y", "zz"], max_new_tokens=50, seed=2)
    assert set(done.reasons) == {"end"}
    for text, tokens in zip(done.texts, done.tokens, strict=True):
        assert tokens[-1] == 256
        assert 256 not in tokens[:-1]
        assert text == TOKENIZER.decode(tokens)


def test_rows_and_seeds():
    alone = [text_of(LETTERS, prompt, seed=1, max_new_tokens=20) for prompt in ("p", "quite long", "ö")]
    options = {"max_new_tokens": 20, "seed": 1}
    assert generate(LETTERS, TOKENIZER, ["p", "quite long", "ö"], **options).texts == alone
    assert generate(LETTERS, TOKENIZER, ["ö", "p", "quite long"], **options).texts == [alone[2], *alone[:2]]
    assert text_of(LETTERS, seed=1) == text_of(LETTERS, seed=1) != text_of(LETTERS, seed=2)


def test_ten_and_twenty_more_are_thirty():
    options = {"seed": 4, "temperature": 0.9}
    whole = generate(LETTERS, TOKENIZER, ["x", "yy"], max_new_tokens=30, **options)
    first = generate(LETTERS, TOKENIZER, ["x", "yy"], max_new_tokens=10, **options)
    second = generate(LETTERS, TOKENIZER, ["", ""], max_new_tokens=20, state=first.continuation, **options)
    assert [a + b for a, b in zip(first.texts, second.texts, strict=True)] == whole.texts
    assert [a + b for a, b in zip(first.tokens, second.tokens, strict=True)] == whole.tokens


def test_a_plain_state_is_a_past():
    with torch.no_grad():
        state = LETTERS.eval()(torch.tensor([[256, *b"ab"]])).state
    expected = text_of(LETTERS, "abcd", temperature=0, max_new_tokens=20)
    assert text_of(LETTERS, "cd", temperature=0, max_new_tokens=20, state=state) == expected


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([""], {}, "the prompt is empty"),
        (["a", ""], {}, "the prompt is empty"),
        ("abc", {}, "give a list"),
        (["a"], {"max_new_tokens": 0}, "at least 1"),
        (["a"], {"stop": [""]}, "stop string is empty"),
        (["a"], {"stop": "END"}, "stop='END' is one string: give a list"),
        (["a"], {"temperature": -1}, "temperature=-1"),
        (["a"], {"top_k": 0}, "top_k=0"),
        (["a"], {"top_p": 2}, "top_p=2"),
        (["a"], {"state": LETTERS.init_state(2)}, "1 prompts for a state of 2 rows"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_made(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(LETTERS, TOKENIZER, prompts, on_text=lambda *_: pytest.fail("text"), **options)


@pytest.mark.parametrize("prompts", [[[1, 2]], [None], torch.tensor([[1, 2]])])
def test_prompts_that_are_no_texts_are_refused(prompts):
    with pytest.raises(TypeError, match=r"a prompt is a .*: give texts"):
        generate(LETTERS, TOKENIZER, prompts)


@pytest.mark.parametrize(("model", "tokenizer"), [("runs/x", TOKENIZER), (LETTERS, None)])
def test_what_is_no_model_and_no_tokenizer_is_refused(model, tokenizer):
    with pytest.raises(TypeError, match=r"takes a model and its tokenizer.*ssmoe.load\(FOLDER\) gives both"):
        generate(model, tokenizer, ["a"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_told_instead_of_text(temperature, dtype):
    model = build(small("mamba", vocab_size=257), dtype=dtype)
    with torch.no_grad():
        model.embedding.weight[3].fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not numbers: its weights, or the state"):
        generate(model, TOKENIZER, ["a"], temperature=temperature)


def test_a_continuation_of_other_rows_is_refused():
    end = generate(LETTERS, TOKENIZER, ["a", "b"], max_new_tokens=2).continuation
    with pytest.raises(ValueError, match="1 prompts for a state of 2 rows"):
        generate(LETTERS, TOKENIZER, ["a"], state=end)


def test_a_training_model_is_put_in_eval_mode():
    LETTERS.train()
    assert text_of(LETTERS, seed=1) == text_of(LETTERS, seed=1)
    assert not LETTERS.training


def test_several_continuations_are_those_of_the_following_seeds():
    model, tokenizer = build(small("hybrid", vocab_size=257)).double(), ByteTokenizer()
    prompts = ["state", "é"]
    together = generate(model, tokenizer, prompts, max_new_tokens=9, seed=4, n=3)
    assert len(set(together.texts)) > 2
    for i in range(3):
        alone = generate(model, tokenizer, prompts, max_new_tokens=9, seed=4 + i)
        assert together.tokens[i::3] == alone.tokens
    more = generate(model, tokenizer, [""] * 6, max_new_tokens=2, state=together.continuation)
    assert len(more.texts) == 6
    with pytest.raises(ValueError, match="n=0"):
        generate(model, tokenizer, prompts, n=0)
