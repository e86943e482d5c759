import json
import re

import pytest

from ssmoe.training import report as module
from ssmoe.training.folder import create_folder
from ssmoe.training.report import write_report


@pytest.fixture
def folder(tiny_run, tmp_path):
    """A finished run, by hand."""
    run = tiny_run("description=a <b>bold</b> run")
    path = tmp_path / "run"
    create_folder(path, run, "reference", data={"content": "", "tokenizer": ""})
    router = {"max_over_mean": 1.5, "dead": 0}
    records = [
        {"step": s, "mode": "train", "tokens": 128 * s, "lm_loss": 5 / s, "seconds": s / 4, "router": router}
        for s in range(1, 7)
    ]
    evaluation = {"mode": "eval", "tokens": 384, "seconds": 1.0}
    records.insert(3, {**evaluation, "step": 3, "held_out_loss": 3.25, "held_out_bits_per_byte": 4.5})
    records.append({**evaluation, "step": 6, "held_out_loss": 2.75, "held_out_bits_per_byte": 3.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_picture_and_page_that_stands_alone(folder):
    lines = write_report(folder)
    assert lines == [f"report: {folder / 'report.html'}", f"picture: {folder / 'loss.png'}"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    for words in ("2.7500 nats, 3.500 bits/byte", "3.2500 nats", "6 steps, 768 tokens", "max_over_mean 1.5"):
        assert words in page
    assert "a &lt;b&gt;bold&lt;/b&gt; run" in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []


def test_without_matplotlib_the_page_says_how_to_get_a_picture(folder, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert "ssmoe[plots]" in write_report(folder)[1]
    assert not (folder / "loss.png").exists()
    assert "ssmoe[plots]" in (folder / "report.html").read_text()


def test_steps_too_quick_to_measure(folder):
    path = folder / "metrics.jsonl"
    path.write_text(re.sub(r'"seconds": [\d.]+', '"seconds": 0.0', path.read_text()))
    write_report(folder)
