from itertools import count

import pytest

from ssmoe.config.data import DataConfig
from ssmoe.data import prepare as module
from ssmoe.data.prepare import prepare, prepare_text
from ssmoe.data.sources import Document, read_documents
from ssmoe.data.tokenizer import END_TOKEN, ByteTokenizer, train_bpe


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        text = f"document {number}: {END_TOKEN} é 🙂\n" + f"the number is {number * number}\n" * (number % 7)
        (folder / f"{number:02}.txt").write_text(text)
    cache_dir = str(tmp_path / "cache")
    return DataConfig(sources=(str(folder),), cache_dir=cache_dir, tokenizer="bytes", held_out=0.2)


def texts_of(prepared, corpus):
    return [
        prepared.tokenizer.decode(corpus.document(number).tolist()) for number in range(corpus.num_documents)
    ]


def change(config, **fields):
    return config.model_copy(update=fields)


def assert_same(left, right):
    assert left.content_hash == right.content_hash
    assert left.tokenizer.fingerprint == right.tokenizer.fingerprint
    for one, other in ((left.train, right.train), (left.held_out, right.held_out)):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.offsets.tolist() == other.offsets.tolist()
        assert (one.num_bytes, one.end_id) == (other.num_bytes, other.end_id)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_every_document_is_on_one_side_in_order(config, tokenizer):
    prepared = prepare(change(config, tokenizer=tokenizer))
    documents = [document.text for document in read_documents(config)]
    train, held_out = texts_of(prepared, prepared.train), texts_of(prepared, prepared.held_out)
    assert train == [text for text in documents if text in set(train)]
    assert held_out == [text for text in documents if text in set(held_out)]
    assert sorted(train + held_out) == sorted(documents)
    assert 3 < len(held_out) < 25
    assert prepared.train.num_bytes == sum(len(text.encode()) for text in train)
    assert prepared.held_out.num_bytes == sum(len(text.encode()) for text in held_out)
    for corpus in (prepared.train, prepared.held_out):
        assert corpus.end_id == prepared.tokenizer.end_id
        assert corpus.end_id not in corpus.tokens


def test_second_time_comes_from_the_cache(config, monkeypatch):
    config = change(config, tokenizer="bpe:280")
    lines: list[str] = []
    first = prepare(config, log=lines.append)
    assert [line.split()[0] for line in lines] == ["training", "tokenising", "tokenising"]
    monkeypatch.setattr(module, "train_bpe", None)
    monkeypatch.setattr(module, "write_corpus", None)
    assert_same(first, prepare(config, log=lines.append))
    assert len(lines) == 3


def test_damaged_cache_is_rebuilt(config, tmp_path):
    config = change(config, tokenizer="bpe:280")
    first = prepare(config)
    files = sorted((tmp_path / "cache").iterdir())
    assert [file.suffix for file in files] == [".tokenizer", ".tokens", ".tokens"]
    for file in files:
        whole = file.read_bytes()
        for damage in (whole[: len(whole) // 2], b"", whole[:100] + b"?" + whole[101:]):
            file.unlink()
            file.write_bytes(damage)
            assert_same(first, prepare(config))
            assert file.read_bytes() == whole
    assert sorted((tmp_path / "cache").iterdir()) == files


def test_changed_text_is_read_anew(config, tmp_path):
    first = prepare(config)
    (tmp_path / "text" / "00.txt").write_text("something else")
    second = prepare(config)
    assert first.content_hash != second.content_hash
    assert "something else" in texts_of(second, second.train) + texts_of(second, second.held_out)


def test_content_hash_is_of_the_split_text(config):
    hashes = [
        prepare(changed).content_hash
        for changed in (
            config,
            change(config, held_out=0.5),
            change(config, max_document_bytes=20),
            change(config, sources=(config.sources[0] + "/5*.txt", *config.sources)),
        )
    ]
    assert len(set(hashes)) == 4
    assert prepare(change(config, tokenizer="bpe:280")).content_hash == hashes[0]


def test_split_does_not_depend_on_the_order_of_the_sources(config):
    first = prepare(config)
    second = prepare(change(config, sources=(config.sources[0] + "/5*.txt", *config.sources)))
    assert sorted(texts_of(first, first.held_out)) == sorted(texts_of(second, second.held_out))


def test_same_text_twice_is_on_the_same_side(config, tmp_path):
    for file in list((tmp_path / "text").iterdir()):
        file.with_stem(file.stem + "-copy").write_bytes(file.read_bytes())
    prepared = prepare(config)
    train, held_out = texts_of(prepared, prepared.train), texts_of(prepared, prepared.held_out)
    assert len(train) + len(held_out) == 120
    assert not set(train) & set(held_out)


def test_given_tokenizer_replaces_the_configured_one(config):
    tokenizer = train_bpe(["some other text"] * 100, 260)
    prepared = prepare(change(config, tokenizer="bpe:280"), tokenizer=tokenizer)
    assert prepared.tokenizer is tokenizer
    assert texts_of(prepared, prepared.train) == texts_of(prepare(config), prepare(config).train)


def test_tokenizer_file(config, tmp_path):
    train_bpe(["some other text"] * 100, 260, "<end>").save(tmp_path / "saved")
    config = change(config, tokenizer=str(tmp_path / "saved" / "tokenizer.json"))
    prepared = prepare(change(config, end_token="<end>"))
    assert prepared.tokenizer.vocab_size == 260
    with pytest.raises(ValueError, match=r"set data\.end_token='<end>'"):
        prepare(config)


@pytest.fixture
def bpe_texts(monkeypatch) -> list[str]:
    """The texts that the next BPE is trained on, as they are read."""
    seen: list[str] = []

    def train(texts, *arguments):
        seen[:] = texts
        return train_bpe(seen, *arguments)

    monkeypatch.setattr(module, "train_bpe", train)
    return seen


def test_bpe_never_sees_held_out_text(config, bpe_texts):
    prepared = prepare(change(config, tokenizer="bpe:280"))
    assert bpe_texts == texts_of(prepared, prepared.train)


def test_bpe_sample_is_bounded_and_does_not_depend_on_order(config, bpe_texts, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "BPE_SAMPLE_BYTES", 1000)
    config = change(config, tokenizer="bpe:270")
    first = prepare(config)
    sample = sorted(bpe_texts)
    assert 800 < sum(len(text.encode()) for text in sample) <= 1000
    train = sorted(texts_of(first, first.train), key=lambda text: Document("", text).digest)
    assert sample == sorted(train[: len(sample)])
    sources = (config.sources[0] + "/5*.txt", *config.sources)
    second = prepare(change(config, sources=sources, cache_dir=str(tmp_path / "other")))
    assert sorted(bpe_texts) == sample
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_bpe_sample_is_never_empty(config, bpe_texts, monkeypatch):
    monkeypatch.setattr(module, "BPE_SAMPLE_BYTES", 1)
    prepare(change(config, tokenizer="bpe:258"))
    assert len(bpe_texts) == 1


def test_bpe_is_cached_under_its_end_token(config):
    first, second = (
        prepare(change(config, tokenizer="bpe:280", end_token=end)) for end in (END_TOKEN, "<end>")
    )
    assert first.tokenizer.fingerprint != second.tokenizer.fingerprint


def test_small_groups_change_nothing(config, monkeypatch, tmp_path):
    first = prepare(config)
    monkeypatch.setattr(module, "_GROUP_BYTES", 100)
    lines: list[str] = []
    assert_same(first, prepare(change(config, cache_dir=str(tmp_path / "other")), log=lines.append))
    assert "tokenised 0 MB" in lines


def test_text_that_changes_underneath_is_refused(config, monkeypatch):
    versions = count()

    def changing(_):
        yield Document("a", "constant")
        yield Document("b", f"version {next(versions)}")

    monkeypatch.setattr(module, "read_documents", changing)
    with pytest.raises(ValueError, match="text changed while it was being read"):
        prepare(config, tokenizer=ByteTokenizer())


def test_bytes_that_are_no_text_are_told(config, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    lines: list[str] = []
    sources = (*config.sources, str(tmp_path / "latin.txt"))
    prepare(change(config, sources=sources), log=lines.append)
    [line] = [line for line in lines if "UTF-8" in line]
    assert f"the first one {(tmp_path / 'latin.txt').as_posix()}: convert" in line
    lines.clear()
    prepare(config, log=lines.append)
    assert not [line for line in lines if "UTF-8" in line]


def test_single_document_names_the_remedy(config, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line of text {number:2}\n" for number in range(100)))
    with pytest.raises(ValueError, match=r"data\.max_document_bytes=320\b"):
        prepare(change(config, sources=(str(path),)))
    prepared = prepare(change(config, sources=(str(path),), max_document_bytes=320))
    assert prepared.held_out.num_documents >= 1


def test_text_without_a_split_is_all_documents_in_order(config):
    corpus = prepare_text(config, ByteTokenizer())
    texts = [document.text for document in read_documents(config)]
    found = [ByteTokenizer().decode(corpus.document(i).tolist()) for i in range(corpus.num_documents)]
    assert found == texts
    assert corpus.num_bytes == sum(len(text.encode()) for text in texts)
    both = prepare(config)
    assert corpus.num_tokens == both.train.num_tokens + both.held_out.num_tokens
    lines: list[str] = []
    prepare_text(config, ByteTokenizer(), log=lines.append)
    assert lines == []
    one = change(config, sources=(config.sources[0] + "/00.txt",))
    assert prepare_text(one, ByteTokenizer()).num_documents == 1
