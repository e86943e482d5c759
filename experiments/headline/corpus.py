"""Text files to tokens, once for all runs: every 100th megabyte of a file is held out, whole.

A folder with text/*.txt, plain or .xz, and a tokenizer.json. Files are read side by side and tokenised by
several processes; the result lies in a cache under a name made from the files' bytes.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from filelock import FileLock

from ssmoe.config.data import DataConfig
from ssmoe.data.corpus import Encoded, read_corpus, write_corpus
from ssmoe.data.prepare import Prepared
from ssmoe.data.sources import read_documents
from ssmoe.data.tokenizer import Tokenizer, load_tokenizer

PIECE = 1_000_000
"""Bytes of a document, cut at a line end."""
EVERY, FIRST = 100, 10
"""Pieces 10, 110, 210 ... of each file are held out: their neighbours on both sides are trained on."""

_tokenizer: Tokenizer | None = None


def prepare(
    folder: Path, cache: Path, tokenizer: Path, *, processes: int | None = None, piece: int = PIECE
) -> Prepared:
    """The tokens of folder/text, from the cache where they lie there.

    Raises ValueError where there is no text, or too little to hold any out.
    """
    files = sorted(path for path in (folder / "text").glob("*.txt*") if path.is_file())
    if not files:
        raise ValueError(f"{folder}/text holds no .txt or .txt.xz file: name the folder above it")
    loaded = load_tokenizer(tokenizer)
    key = _key(files, loaded, piece)
    paths = [cache / f"headline-{key}-{part}.tokens" for part in ("train", "held-out")]
    cache.mkdir(parents=True, exist_ok=True)
    # of several runners that begin together one tokenises and the others wait
    with FileLock(cache / f"headline-{key}.lock"):
        corpora = [read_corpus(path) for path in paths]
        if None in corpora:
            _tokenise(files, paths, tokenizer, loaded, processes or min(32, os.cpu_count() or 1), piece)
            corpora = [read_corpus(path) for path in paths]
    train, held_out = corpora
    assert train is not None
    assert held_out is not None
    if not held_out.num_documents:
        raise ValueError(f"no file of {folder}/text has more than {FIRST} megabytes, so none is held out")
    return Prepared(tokenizer=loaded, train=train, held_out=held_out, content_hash=key)


def _key(files: list[Path], tokenizer: Tokenizer, piece: int) -> str:
    total = blake2b(f"{tokenizer.fingerprint} {piece} {EVERY} {FIRST}".encode(), digest_size=8)
    for path in files:
        total.update(path.name.encode() + blake2b(path.read_bytes()).digest())
    return total.hexdigest()


def _tokenise(
    files: list[Path], paths: list[Path], tokenizer: Path, loaded: Tokenizer, processes: int, piece: int
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_start, initargs=(tokenizer,)
    )
    with pool, ThreadPoolExecutor(len(files)) as readers:
        waiting = list(readers.map(lambda path: _submit(pool, path, piece), files))
        for path, held_out in zip(paths, (False, True), strict=True):
            documents = _results(waiting, held_out)
            write_corpus(path, documents, vocab_size=loaded.vocab_size, end_id=loaded.end_id)


def _submit(pool: ProcessPoolExecutor, path: Path, piece: int) -> list[Future[Encoded]]:
    config = DataConfig(sources=(str(path),), max_document_bytes=piece)
    return [pool.submit(_encode, document.text) for document in read_documents(config)]


def _results(waiting: list[list[Future[Encoded]]], held_out: bool) -> Iterator[Encoded]:
    for pieces in waiting:
        yield from (future.result() for i, future in enumerate(pieces) if (i % EVERY == FIRST) == held_out)


def _start(tokenizer: Path) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(tokenizer)


def _encode(text: str) -> Encoded:
    assert _tokenizer is not None
    ids = np.asarray(_tokenizer.encode(text), np.uint32)
    return Encoded(ids, len(text.encode()))  # pyright: ignore[reportArgumentType], an array travels faster
