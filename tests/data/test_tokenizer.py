import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ssmoe.data.tokenizer import (
    END_TOKEN,
    ByteTokenizer,
    HuggingFaceTokenizer,
    TextStream,
    load_tokenizer,
    train_bpe,
)

TEXTS = [
    "def f(x):\n    return x + 1\n" * 20,
    "The quick brown fox jumps over the lazy dog. " * 20,
    "naïve café, façade, Ünïcödé. " * 20,
    "日本語のテキスト、絵文字 🙂👩‍👩‍👧 と記号。" * 20,
]


def random_text(seed: int) -> str:
    generator = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    pieces = [chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randrange(200))]
    pieces += generator.choices(["  ", "\r\n", "\ufeff", "\ufffd", "\0", END_TOKEN, "🙂", "the "], k=10)
    generator.shuffle(pieces)
    return "".join(pieces)


def random_ids(tokenizer, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randrange(60))]


@pytest.fixture(scope="module")
def bpe() -> HuggingFaceTokenizer:
    return train_bpe(TEXTS, 320)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


@pytest.fixture
def word_pieces() -> tokenizers.Tokenizer:
    """As of a sentencepiece model: a Unigram with "▁" for spaces, bytes for the unknown, and an end token
    that is also a word."""
    words = ["</s>", "<unk>", "▁hello", "▁world", "▁", "h", "e", "l", "o", "s", "<", "/", ">"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(models.Unigram([(word, -1.0) for word in words], 1, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return backend


@pytest.mark.parametrize("seed", range(40))
def test_round_trip(tokenizer, seed):
    text = random_text(seed)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_equals_one_by_one(tokenizer):
    texts = [random_text(seed) for seed in range(20)] + [""]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_ids_are_below_vocab_size(tokenizer):
    ids = [id for seed in range(20) for id in tokenizer.encode(random_text(seed))]
    assert min(ids) >= 0
    assert max(ids) < tokenizer.vocab_size
    assert 0 <= tokenizer.end_id < tokenizer.vocab_size


def test_text_never_becomes_the_end_token(tokenizer):
    text = f"{END_TOKEN}a{END_TOKEN}{END_TOKEN} b"
    ids = tokenizer.encode(text)
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.end_id, *ids, tokenizer.end_id]) == text


def test_text_never_becomes_another_special_token(bpe, tmp_path):
    bpe.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<|user|>"])
    assert backend.encode("<|user|>").ids == [bpe.vocab_size]
    tokenizer = HuggingFaceTokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("a <|user|> b")) == "a <|user|> b"


def test_end_token_that_is_a_word_of_the_vocabulary_is_spelled_out(word_pieces):
    assert word_pieces.encode("</s>", add_special_tokens=False).ids == [0]
    tokenizer = HuggingFaceTokenizer(word_pieces, "</s>")
    for text in ("</s>", "hello </s> world</s></s>", "hello"):
        assert 0 not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_end_token_that_text_cannot_avoid_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"end": 0, "a": 1}, unk_token="end"))
    tokenizer = HuggingFaceTokenizer(backend, "end")
    assert tokenizer.encode("a") == [1]
    with pytest.raises(ValueError, match=r"end token 'end'.*data\.end_token"):
        tokenizer.encode("unknown")


@pytest.mark.parametrize("seed", range(40))
def test_streamed_pieces_join_to_the_decoding(tokenizer, seed):
    # random ids are rarely UTF-8; text of many scripts always is
    for ids in (random_ids(tokenizer, seed), tokenizer.encode(random_text(seed))):
        stream = tokenizer.stream()
        pieces = [stream.feed(id) for id in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_waits_for_whole_characters(tokenizer):
    text = "a🙂é👩‍👩‍👧"
    stream = tokenizer.stream()
    pieces = [stream.feed(id) for id in tokenizer.encode(text)]
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_stream_flushes_what_never_became_a_character(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode("a🙂")
    assert "".join(stream.feed(id) for id in ids[:-1]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.feed(ids[0]) == "a"


def test_stream_keeps_the_spaces_of_word_pieces(word_pieces):
    tokenizer = HuggingFaceTokenizer(word_pieces, "</s>")
    ids = [2, 3, 0, 3, *tokenizer.encode("🙂"), 2]
    stream = tokenizer.stream()
    pieces = [stream.feed(id) for id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) == "hello world world 🙂 hello"
    assert pieces[:2] == ["hello", " world"]


def test_stream_does_not_grow(bpe):
    lengths: list[int] = []

    def decode(ids):
        lengths.append(len(ids))
        return bpe.decode(ids)

    stream = TextStream(decode)
    for id in bpe.encode("x = 1\n" * 100):
        stream.feed(id)
    assert max(lengths) <= 4


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "folder")
    for path in (tmp_path / "folder", tmp_path / "folder" / "tokenizer.json", str(tmp_path / "folder")):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
        assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_bytes_file_means_the_same_to_the_tokenizers_library(tmp_path):
    ByteTokenizer().save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    everything = "".join(map(chr, range(0x800))) + TEXTS[3]
    assert backend.encode(everything).ids == ByteTokenizer().encode(everything)
    assert backend.decode(ByteTokenizer().encode(everything)) == everything
    assert backend.token_to_id(END_TOKEN) == ByteTokenizer.end_id
    assert backend.get_vocab_size() == ByteTokenizer.vocab_size


def test_end_token_is_saved_with_the_tokenizer(tmp_path):
    tokenizer = train_bpe(TEXTS, 300, "<end>")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).end_id == tokenizer.end_id
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    config.unlink()
    with pytest.raises(ValueError, match=r"no token '<\|endoftext\|>'.*data\.end_token='<end>'"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, "<end>").fingerprint == tokenizer.fingerprint


def test_file_made_for_another_model_encodes_whole_documents(bpe, tmp_path):
    bpe.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.post_processor = processors.TemplateProcessing("a $A", special_tokens=[("a", 65)])
    tokenizer = HuggingFaceTokenizer(backend)
    assert tokenizer.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)


def test_vocab_size_covers_gaps():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 700}, unk_token="a"))
    assert HuggingFaceTokenizer(backend, "b").vocab_size == 701


def test_training_does_not_depend_on_order(bpe):
    assert train_bpe(reversed(TEXTS), 320).fingerprint == bpe.fingerprint


def test_fingerprints_differ(bpe):
    others = [
        ByteTokenizer(),
        train_bpe(TEXTS, 319),
        train_bpe(TEXTS, 320, "<end>"),
        train_bpe(TEXTS[:3], 320),
    ]
    assert len({tokenizer.fingerprint for tokenizer in [bpe, *others]}) == 5


def test_fingerprint_covers_what_is_not_vocabulary(bpe, tmp_path):
    bpe.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    assert HuggingFaceTokenizer(backend).fingerprint != bpe.fingerprint
    assert HuggingFaceTokenizer(backend, "!").fingerprint != HuggingFaceTokenizer(backend, "?").fingerprint


def test_too_little_text_for_the_vocabulary():
    with pytest.raises(ValueError, match=r"bpe:5000 needs more text.*set data\.tokenizer=bpe:\d+ or bytes"):
        train_bpe(TEXTS, 5000)


@pytest.mark.parametrize("content", ["not json", "{}", "[1]", '{"version": "9"}', "\udcff"])
def test_file_that_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"tokenizer\.json (is not a|cannot be read)"):
        load_tokenizer(path)


def test_missing_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"tokenizer\.json cannot be read .*: name a tokenizer\.json or its folder"
    ):
        load_tokenizer(tmp_path)
