import json
import shutil

import pytest

from ssmoe.cli.main import main
from ssmoe.data.prepare import prepare, prepare_text
from ssmoe.eval.perplexity import evaluate
from ssmoe.training.checkpoint import find_weights, load
from ssmoe.training.folder import read_run
from ssmoe.training.metrics import read_metrics


@pytest.fixture
def evaluated(capsys):
    def run(*argv):
        assert main(["eval", *map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_all_held_out_text_and_the_bigrams(evaluated, trained):
    found = evaluated(trained, "--bigram")
    model, _ = load(trained)
    data = prepare(read_run(trained).data)
    expected = evaluate(model, data.held_out, context=32, batch_size=16)
    assert found["model"]["targets"] == data.held_out.num_targets
    assert found["model"]["loss"] == pytest.approx(expected.loss)
    assert (found["text"], found["model"]["mode"]) == ("held-out", "eval")
    # bytes are this tokenizer's tokens
    assert found["token_bigram"]["bits_per_byte"] == pytest.approx(found["byte_bigram"]["bits_per_byte"])


def test_the_rows_of_training_give_the_figure_of_training(evaluated, trained):
    last = [record for record in read_metrics(trained) if record["mode"] == "eval"][-1]
    found = evaluated(trained, "--rows", 4, "--batch-size", 3)["model"]
    assert found["loss"] == pytest.approx(last["held_out_loss"], rel=1e-5)
    assert found["targets"] == last["held_out_targets"] == 4 * 32


def test_other_text_is_read_whole(evaluated, trained, tmp_path):
    (tmp_path / "a.txt").write_text("state space model")
    (tmp_path / "b.md").write_text("router é")
    found = evaluated(trained, "--data", tmp_path / "a.txt", tmp_path / "b.md")
    assert found["text"] == "data"
    assert found["model"]["targets"] == 17 + 1 + 9 + 1
    model, tokenizer = load(trained)
    data = read_run(trained).data.model_copy(update={"sources": (str(tmp_path),)})
    corpus = prepare_text(data, tokenizer)
    assert corpus.num_documents == 2
    assert found["model"]["loss"] == pytest.approx(
        evaluate(model, corpus, context=32, batch_size=2).loss, rel=1e-5
    )
    shorter = evaluated(trained, "--data", tmp_path / "a.txt", tmp_path / "b.md", "--context", 5)
    assert shorter["model"]["loss"] != found["model"]["loss"]


def test_weights_alone_need_no_run(evaluated, trained, tmp_path, fails, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(find_weights(trained), tmp_path / "alone")
    (tmp_path / "a.txt").write_text("state space model")
    fails("eval", tmp_path / "alone", says=("not in a run folder", "name text with --data"))
    assert evaluated(tmp_path / "alone", "--data", tmp_path / "a.txt")["model"]["targets"] == 18
    inside = find_weights(trained)
    assert evaluated(inside, "--rows", 2) == evaluated(trained, "--rows", 2)


def test_text_that_changed_is_told(tiny_file, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text(f"document {number} " * 20)
    argv = ["train", str(tiny_file), f"data.sources={text}", "train.steps=1", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    assert main(["eval", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""
    (text / "9.txt").write_text("one more")
    assert main(["eval", str(tmp_path / "out")]) == 0
    assert "the text has changed since the run began" in capsys.readouterr().err


def test_for_people(trained, capsys):
    assert main(["eval", str(trained), "--bigram"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("held-out loss ")
    assert "bits/byte" in lines[0]
    assert [line.split(" on ")[0] for line in lines[1:]] == ["token bigram", "byte bigram"]
    assert all(line.endswith("the model is NOT better") for line in lines[1:])


def test_bad_input(fails, trained, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    fails("eval", trained, "--rows", "-1", says=("--rows must be 0 or more",))
    fails("eval", trained, "--batch-size", "0", says=("--batch-size 1 or more",))
    fails("eval", trained, "--context", "0", says=("--context 0",))
    fails("eval", trained, "--data", tmp_path / "empty.txt", says=("hold no text",))
    fails("eval", trained, "--data", tmp_path / "none.txt", says=("none.txt",))
    fails("eval", trained, "--data", tmp_path / "empty.txt", "--bigram", says=("leave --data or --bigram",))
    fails("eval", "demo", says=("no such folder: demo",))
