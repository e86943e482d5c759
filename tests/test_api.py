import json
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console

import ssmoe
from ssmoe import api
from ssmoe.api import Interrupted, compare, evaluator, train
from ssmoe.data.prepare import prepare
from ssmoe.eval.perplexity import HeldOut
from ssmoe.model.build import build
from ssmoe.training import loop
from ssmoe.training.metrics import read_metrics


def interrupt_at(monkeypatch, step):
    """Ctrl-C while a step is computed."""
    steps = iter(range(1, step))

    def interrupted(*args, **kwargs):
        if next(steps, None) is None:
            signal.raise_signal(signal.SIGINT)
        return whole(*args, **kwargs)

    whole = loop.train_step
    monkeypatch.setattr(loop, "train_step", interrupted)


def test_train_returns_the_folder_and_says_nothing(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ssmoe.train(tiny_run())
    assert folder == Path("runs/tiny")
    model, tokenizer = ssmoe.load(folder)
    done = ssmoe.generate(model, tokenizer, ["state "], max_new_tokens=5)
    assert len(done.tokens[0]) == 5
    assert capsys.readouterr() == ("", "")


def test_a_trained_bpe_comes_back_on_resuming(tiny_run, tmp_path, monkeypatch):
    run = tiny_run("data.tokenizer=bpe:280", "model.vocab_size=280")
    train(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            train(run, tmp_path / "parts")
    train(run, tmp_path / "parts", resume=True)
    losses = [[r.get("loss") for r in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("step", [1, 3, 5])
def test_ctrl_c_saves_and_says_how_to_go_on(tiny_run, tmp_path, monkeypatch, step):
    run, folder = tiny_run(), tmp_path / "a run"
    # a job in the background starts with Ctrl-C ignored
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Interrupted, match=r"go on with `ssmoe train '.*/a run' --resume`"):
            train(run, folder)
    assert read_metrics(folder)[-1]["step"] == step
    assert (folder / "checkpoints" / f"step-{step}").is_dir()
    assert signal.getsignal(signal.SIGINT) is before
    train(run, folder, resume=True)
    train(run, tmp_path / "whole")
    losses = [[r.get("loss") for r in read_metrics(path)] for path in (folder, tmp_path / "whole")]
    assert losses[0] == losses[1]


def test_ctrl_c_at_the_last_step_is_the_end(tiny_run, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 6)
    assert (train(tiny_run(), tmp_path / "r") / "report.html").is_file()


def test_ctrl_c_in_an_evaluation_takes_no_further_step(tiny_run, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return whole(*args, **kwargs)

    whole = api.evaluate
    monkeypatch.setattr(api, "evaluate", interrupted)
    with pytest.raises(Interrupted):
        train(tiny_run(), tmp_path / "r")
    assert read_metrics(tmp_path / "r")[-1]["step"] == 3


def test_an_interrupted_comparison_names_its_own_command(tiny_run, tmp_path, monkeypatch):
    runs = [tiny_run("name=a"), tiny_run("name=b", "model.pattern.moe.num_experts=2")]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(Interrupted, match="same command and --resume"):
            compare(runs, tmp_path)
    assert read_metrics(tmp_path / "b")[-1]["step"] == 2
    found = compare(runs, tmp_path, resume=True)
    assert [row.name for row in found.rows] == ["a", "b"]
    assert json.loads((tmp_path / "compare.json").read_text())["baseline"] == "a"


def test_a_comparison_goes_on_from_a_run_that_had_no_checkpoint_yet(tiny_run, tmp_path):
    runs = [tiny_run("name=a"), tiny_run("name=b", "model.pattern.moe.num_experts=2")]
    first = compare(runs, tmp_path)
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    found = compare(runs, tmp_path, resume=True)
    assert [row.final_loss for row in found.rows] == [row.final_loss for row in first.rows]


def test_held_out_text_is_scored_as_the_run_says(tiny_run, monkeypatch):
    asked = []

    def note(model, corpus, **options):
        asked.append((corpus, options))
        return HeldOut(2.0, 7.4, 3.0, 5)

    monkeypatch.setattr(api, "evaluate", note)
    run = tiny_run("data.isolate_documents=false", "train.eval_rows=3", "data.mask_fraction=0.25")
    data = prepare(run.data)
    found = evaluator(run, data)(build(run.model))
    assert found == {"held_out_loss": 2.0, "held_out_bits_per_byte": 3.0, "held_out_targets": 5}
    options = {"context": 32, "batch_size": 2, "rows": 3, "isolate": False, "mask_fraction": 0.25}
    assert asked == [(data.held_out, options)]


def test_an_interrupted_comparison_does_not_promise_what_is_not_saved(tiny_run, tmp_path, monkeypatch):
    runs = [tiny_run("name=a", "train.keep_checkpoints=0"), tiny_run("name=b")]
    interrupt_at(monkeypatch, 2)
    with pytest.raises(Interrupted, match="nothing is saved"):
        compare(runs, tmp_path)


def test_paths_with_brackets_are_printed_as_they_are(tiny_run, tmp_path):
    with (tmp_path / "log").open("w") as file:
        train(tiny_run(), tmp_path / "[bold]x[", console=Console(file=file, width=30))
    assert f"report: {tmp_path}/[bold]x[/report.html" in (tmp_path / "log").read_text()


def test_train_takes_a_configuration(tmp_path):
    with pytest.raises(TypeError, match=r"not str: ssmoe.preset\(NAME\) is one"):
        train("mamba-tiny", tmp_path)
