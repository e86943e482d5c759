import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ssmoe.data import corpus as corpus_module
from ssmoe.data.corpus import Encoded, open_replacing, read_corpus, write_corpus

DOCUMENTS = [Encoded([5, 6, 7], 10), Encoded([], 1), Encoded([256], 2)]


def write(path, vocab_size=257):
    write_corpus(path, iter(DOCUMENTS), vocab_size=vocab_size, end_id=3)


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(257, 2), (65536, 2), (65537, 4)])
def test_round_trip(tmp_path, vocab_size, itemsize):
    path = tmp_path / "deep" / "corpus.tokens"
    write(path, vocab_size)
    corpus = read_corpus(path)
    assert [corpus.document(number).tolist() for number in range(3)] == [ids for ids, _ in DOCUMENTS]
    assert (corpus.num_documents, corpus.num_tokens, corpus.num_bytes) == (3, 4, 13)
    assert (corpus.num_targets, corpus.end_id) == (7, 3)
    assert corpus.tokens.itemsize == itemsize
    assert [file.name for file in path.parent.iterdir()] == ["corpus.tokens"]


def test_largest_id_fits(tmp_path):
    for vocab_size in (1 << 16, 1 << 20):
        write_corpus(tmp_path / "c", [Encoded([vocab_size - 1], 1)], vocab_size=vocab_size, end_id=0)
        assert read_corpus(tmp_path / "c").tokens.tolist() == [vocab_size - 1]


def test_missing_is_none(tmp_path):
    assert read_corpus(tmp_path / "absent") is None


def test_every_truncation_and_every_flipped_byte_is_detected(tmp_path):
    path = tmp_path / "corpus.tokens"
    write(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_corpus(path) is None, length
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert read_corpus(path) is None, place


def test_another_version_of_the_layout_is_none(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_MARKER", b"ssmoe-0\n")
        write(tmp_path / "c")
    assert read_corpus(tmp_path / "c") is None


def test_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with open_replacing(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_killed_writer_leaves_no_file(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from ssmoe.data.corpus import open_replacing\n"
        "with open_replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    write(path)
    assert read_corpus(path) is not None


def test_concurrent_writers_leave_one_whole_file(tmp_path):
    path = tmp_path / "corpus.tokens"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write(path), range(64)))
    assert read_corpus(path).num_tokens == 4
    assert os.listdir(tmp_path) == ["corpus.tokens"]


def test_reader_keeps_its_text_when_the_file_is_replaced(tmp_path):
    path = tmp_path / "corpus.tokens"
    write(path)
    corpus = read_corpus(path)
    write_corpus(path, [Encoded([1] * 1000, 1000)], vocab_size=257, end_id=3)
    np.testing.assert_array_equal(corpus.tokens, [5, 6, 7, 256])


def test_unwritable_folder_names_the_option(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache_dir"):
        write(tmp_path / "file" / "corpus.tokens")
