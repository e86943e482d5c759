import gzip
import json
import lzma
import random
from pathlib import Path

import pytest

from ssmoe.config.data import DataConfig
from ssmoe.data.sources import Document, read_documents


def read(*sources, **options):
    return list(read_documents(DataConfig(sources=tuple(map(str, sources)), **options)))


def texts(*sources, **options):
    return [document.text for document in read(*sources, **options)]


def write(path: Path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    open_ = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with open_(path, "wb") as file:
        file.write(data)
    return path


def test_standard_library():
    documents = read("python-stdlib")
    names = [document.name for document in documents]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert "python-stdlib/json/decoder.py" in names
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    assert not any("config-" in name or "_sysconfigdata" in name for name in names)
    assert dict(documents)["python-stdlib/json/decoder.py"] == Path(json.decoder.__file__).read_text()
    assert documents == read("python-stdlib")


@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".TXT"])
def test_text_file_is_one_document(tmp_path, suffix, compression):
    text = "first\r\nsecond é 🙂\n\n  last\x00"
    path = write(tmp_path / f"a{suffix}{compression}", text)
    assert read(path) == [Document(path.as_posix(), text)]


@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
def test_json_lines(tmp_path, compression):
    lines = [json.dumps({"id": n, "text": text}) for n, text in enumerate(["one", "", "two\nlines é"])]
    path = write(tmp_path / f"a.jsonl{compression}", "\n".join([lines[0], "", *lines[1:]]))
    assert read(path) == [Document(f"{path}:1", "one"), Document(f"{path}:4", "two\nlines é")]


def test_json_field(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"content": "here"}')
    assert texts(path, text_field="content") == ["here"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r":2 is not valid JSON .*remove the line"),
        ('["text"]', r":2 is not a JSON object"),
        (
            '{"body": "b", "id": 1}',
            r":2 has no text in the field 'text': set data.text_field to one of \['body'\]",
        ),
        ('{"text": null}', r":2 has no text"),
    ],
)
def test_bad_json_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path = write(tmp_path / "a.jsonl", r'{"text": "a\ud800b \ud83d\ude42"}')
    assert texts(path) == ["a\ufffdb 🙂"]


def test_undecodable_bytes_are_replaced_and_a_byte_order_mark_is_dropped(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfcaf\xe9\n")) == ["caf\ufffd\n"]


def test_folder_is_read_recursively_in_order(tmp_path):
    for name in ("b/z.txt", "b/a.md.gz", "a.py", "c.jsonl"):
        write(tmp_path / name, '{"text": "in json"}' if "jsonl" in name else name)
    for name in ("picture.png", ".hidden.txt", ".git/config.txt", "empty.txt"):
        write(tmp_path / name, "" if name == "empty.txt" else "no")
    assert texts(tmp_path) == ["a.py", "b/a.md.gz", "b/z.txt", "in json"]


def test_globs(tmp_path, monkeypatch):
    for name in ("x/1.txt", "x/2.txt", "x/deep/3.txt", "x/4.png", "5[0].txt"):
        write(tmp_path / name, name)
    assert texts(tmp_path / "x/*.txt") == ["x/1.txt", "x/2.txt"]
    assert texts(tmp_path / "x/*") == ["x/1.txt", "x/2.txt"]
    assert texts(tmp_path / "**/*.txt") == ["5[0].txt", "x/1.txt", "x/2.txt", "x/deep/3.txt"]
    assert texts(tmp_path / "5[0].txt") == ["5[0].txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/x/[12].txt") == ["x/1.txt", "x/2.txt"]


def test_sources_keep_their_order_and_overlap_counts_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        write(tmp_path / name, name)
    assert texts(tmp_path / "c.txt", tmp_path / "a.txt", tmp_path) == ["c.txt", "a.txt", "b.txt"]


def test_a_file_by_two_paths_is_read_once(tmp_path, monkeypatch):
    write(tmp_path / "docs" / "a.txt", "a")
    write(tmp_path / "docs" / "b.txt", "b")
    monkeypatch.chdir(tmp_path)
    named = ("docs/b.txt", tmp_path / "docs", "docs/../docs", str(tmp_path / "docs" / "*.txt"))
    assert [(d.name, d.text) for d in read(*named)] == [("docs/b.txt", "b"), (f"{tmp_path}/docs/a.txt", "a")]


@pytest.mark.parametrize("limit", [4, 5, 17, 100])
def test_long_documents_are_cut(tmp_path, limit):
    text = "short\n" + "é🙂x" * 20 + "\n\n" + "".join(f"line {n}\n" for n in range(30)) + "end"
    path = write(tmp_path / "a.txt", text)
    documents = read(path, max_document_bytes=limit)
    assert "".join(document.text for document in documents) == text
    assert all(0 < len(document.text.encode()) <= limit for document in documents)
    assert [document.name for document in documents[:2]] == [f"{path}", f"{path}#1"]
    json_path = write(tmp_path / "a.jsonl", json.dumps({"text": text}))
    assert texts(json_path, max_document_bytes=limit) == [document.text for document in documents]


def test_cuts_fall_on_line_ends_where_there_are_any(tmp_path):
    path = write(tmp_path / "a.txt", "".join(f"line {n}\n" for n in range(100)))
    assert all(text.endswith("\n") for text in texts(path, max_document_bytes=20))


def test_undecodable_bytes_can_be_cut_too(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\x80" * 10), max_document_bytes=4) == [
        "\ufffd" * n for n in (4, 4, 2)
    ]


def test_digest_is_of_the_text_alone():
    assert Document("a", "text").digest == Document("b", "text").digest != Document("a", "other").digest


def test_mistakes_are_named_with_a_remedy(tmp_path):
    write(tmp_path / "table.csv", "x")
    write(tmp_path / "void/a.txt", "")
    write(tmp_path / "twice.txt.xz.gz", "x")
    (tmp_path / "nothing").mkdir()
    for source, message in {
        "absent.txt": r"absent\.txt does not exist: correct",
        "*.txt": r"\*\.txt matches no file: name files ending in \.txt",
        "table.csv": r"table\.csv has an unsupported suffix: name files ending in",
        "twice.txt.xz.gz": "unsupported suffix",
        "*.csv": r"\*\.csv matches only files of other suffixes",
        "nothing": "matches no file",
        "void": r"data\.sources=.* hold no text",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(tmp_path / source)


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.xz"])
def test_damaged_archive_is_named(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", random.Random(0).randbytes(1000))
    whole = path.read_bytes()
    damages = [whole[:500], b"not an archive", whole[:200] + bytes(50) + whole[250:]]
    for damage in damages:
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"cannot be read .* fetch it again"):
            texts(path)
