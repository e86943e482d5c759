"""From a configuration to a tokenizer and two tokenised corpora, each built once and cached.

The sources are streamed: once to know every document by its digest, and again for whatever is not cached.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from ssmoe.config.data import DataConfig
from ssmoe.data.corpus import Encoded, TokenCorpus, open_replacing, read_corpus, write_corpus
from ssmoe.data.sources import Document, read_documents
from ssmoe.data.split import choose_held_out, describe_split
from ssmoe.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, parse_tokenizer, train_bpe

BPE_SAMPLE_BYTES = 16 << 20
"""A BPE is trained on about this much text at most, so that it takes seconds on any corpus."""
_GROUP_BYTES = 4 << 20
_GROUPS_A_LINE = 16

Log = Callable[[str], None]


class Prepared(NamedTuple):
    """What a run trains and evaluates on."""

    tokenizer: Tokenizer
    train: TokenCorpus
    held_out: TokenCorpus
    content_hash: str
    """Of the texts, their order and their split, whatever the tokenizer."""


def prepare(config: DataConfig, *, tokenizer: Tokenizer | None = None, log: Log | None = None) -> Prepared:
    """Reads, splits and tokenises the sources; `tokenizer` replaces the configured one, as for a resumed run.

    `log` is told a line before anything that takes long, and more while it goes on.
    """
    log = log or _say_nothing
    survey = _survey(config)
    held_out = choose_held_out(survey.sizes, config.held_out)
    for line in (describe_split(survey.sizes, held_out, config.held_out), _describe_garbled(survey)):
        if line is not None:
            log(line)
    train = survey.sizes.keys() - held_out
    folder = Path(config.cache_dir).expanduser()
    tokenizer = tokenizer or _find_tokenizer(survey, train, folder, log)
    return Prepared(
        tokenizer=tokenizer,
        train=_find_corpus("train", survey, train, tokenizer, folder, log),
        held_out=_find_corpus("held-out", survey, held_out, tokenizer, folder, log),
        content_hash=_hash(*(digest + bytes([digest in held_out]) for digest in survey.digests)),
    )


def prepare_text(config: DataConfig, tokenizer: Tokenizer, *, log: Log | None = None) -> TokenCorpus:
    """Reads and tokenises the sources whole, without a split."""
    survey = _survey(config)
    folder = Path(config.cache_dir).expanduser()
    return _find_corpus("whole", survey, survey.sizes.keys(), tokenizer, folder, log or _say_nothing)


class _Survey(NamedTuple):
    config: DataConfig
    digests: list[bytes]
    """Every document in order."""
    sizes: dict[bytes, int]
    """Its bytes of UTF-8."""
    garbled: list[str]
    """Names of those that hold what stands for bytes that are no UTF-8."""

    def read(self, chosen: Collection[bytes]) -> Iterator[Document]:
        """The chosen documents, in order."""
        for digest, document in zip_longest(self.digests, read_documents(self.config)):
            if document is None or document.digest != digest:
                raise ValueError("the text changed while it was being read: run again once it is complete")
            if digest in chosen:
                yield document


def _survey(config: DataConfig) -> _Survey:
    survey = _Survey(config, [], {}, [])
    for document in read_documents(config):
        digest = document.digest
        survey.digests.append(digest)
        survey.sizes[digest] = len(document.text.encode())
        if "\N{REPLACEMENT CHARACTER}" in document.text:
            survey.garbled.append(document.name)
    return survey


def _describe_garbled(survey: _Survey) -> str | None:
    if not survey.garbled:
        return None
    return (
        f"{len(survey.garbled):,} of {len(survey.digests):,} documents hold bytes that are not UTF-8, read "
        f"as U+FFFD, the first one {survey.garbled[0]}: convert them or leave them out"
    )


def _find_tokenizer(survey: _Survey, train: Collection[bytes], folder: Path, log: Log) -> Tokenizer:
    config = survey.config
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if not config.tokenizer.startswith("bpe:"):
        return load_tokenizer(config.tokenizer, config.end_token)
    sample = _sample(survey.sizes, train)
    path = folder / f"bpe-{_hash(config.tokenizer.encode(), config.end_token.encode(), *sample)}.tokenizer"
    if (cached := _read_tokenizer(path, config.end_token)) is not None:
        return cached
    size = sum(survey.sizes[digest] for digest in sample)
    log(f"training {config.tokenizer} on {size / 1e6:.1f} MB of text")
    texts = (document.text for document in survey.read(frozenset(sample)))
    tokenizer = train_bpe(texts, int(config.tokenizer.removeprefix("bpe:")), config.end_token)
    definition = tokenizer.definition().encode()
    with open_replacing(path) as file:
        file.write(_hash(definition).encode() + b"\n" + definition)
    return tokenizer


def _read_tokenizer(path: Path, end_token: str) -> Tokenizer | None:
    if not path.is_file():
        return None
    checksum, _, definition = path.read_bytes().partition(b"\n")
    if checksum != _hash(definition).encode():
        return None
    return parse_tokenizer(definition.decode(), end_token, name=str(path))


def _sample(sizes: dict[bytes, int], train: Collection[bytes]) -> list[bytes]:
    """Training documents up to `BPE_SAMPLE_BYTES`, at least one; by digest, which is to say at random."""
    chosen: list[bytes] = []
    total = 0
    for digest in sorted(train):
        total += sizes[digest]
        if chosen and total > BPE_SAMPLE_BYTES:
            break
        chosen.append(digest)
    return chosen


def _find_corpus(
    name: str, survey: _Survey, chosen: Collection[bytes], tokenizer: Tokenizer, folder: Path, log: Log
) -> TokenCorpus:
    digests = [digest for digest in survey.digests if digest in chosen]
    path = folder / f"{name}-{_hash(tokenizer.fingerprint.encode(), *digests)}.tokens"
    if (cached := read_corpus(path)) is not None:
        return cached
    size = sum(survey.sizes[digest] for digest in digests)
    log(f"tokenising {len(digests):,} {name} documents, {size / 1e6:.1f} MB")
    documents = _encode(survey.read(chosen), tokenizer, log)
    write_corpus(path, documents, vocab_size=tokenizer.vocab_size, end_id=tokenizer.end_id)
    corpus = read_corpus(path)
    assert corpus is not None
    return corpus


def _encode(documents: Iterable[Document], tokenizer: Tokenizer, log: Log) -> Iterator[Encoded]:
    done = 0
    for number, texts in enumerate(_group(document.text for document in documents), 1):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            num_bytes = len(text.encode())
            done += num_bytes
            yield Encoded(ids, num_bytes)
        if number % _GROUPS_A_LINE == 0:
            log(f"tokenised {done / 1e6:.0f} MB")


def _group(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of about `_GROUP_BYTES`: enough for a tokenizer's threads, little enough for memory."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _hash(*parts: bytes) -> str:
    """A hash of the parts, told apart by their lengths."""
    total = blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8) + part)
    return total.hexdigest()


def _say_nothing(_: str) -> None:
    pass
