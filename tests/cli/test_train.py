import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from ssmoe.cli.main import main
from ssmoe.config.keys import all_keys
from ssmoe.training.checkpoint import find_weights, list_checkpoints, load
from ssmoe.training.metrics import TIMES, read_metrics

PROGRAM = "import sys; from ssmoe.cli.main import main; sys.exit(main(sys.argv[1:]))"


SLOWLY = """
import time
from ssmoe.training import loop
step = loop.train_step
loop.train_step = lambda *args, **options: (time.sleep(0.1), step(*args, **options))[1]
"""
"""The same arithmetic with time enough to be killed in."""


def start(*argv, before=""):
    """A command in a process of its own, with the arithmetic of one thread."""
    return subprocess.Popen(
        [sys.executable, "-c", before + PROGRAM, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    """(exit code, stdout, stderr)"""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def steady(folder):
    """The metrics without what may differ between two runs."""
    records = read_metrics(folder)
    return [{key: value for key, value in r.items() if key not in TIMES} for r in records]


def assert_same_run(left, right):
    assert steady(left) == steady(right)
    ours, theirs = (load(folder)[0].state_dict() for folder in (left, right))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def num_lines(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


FORTY = ("train.steps=40", "train.checkpoint_every=20", "train.eval_every=10", "data.context=128")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), ("train.tbptt=2", "data.context=64")], ids=["rows", "tbptt"])
def test_kill_and_interrupt_and_resume_equal_one_long_run(tiny_file, tmp_path, changes):
    """The issue's 20 steps + kill -9 + resume + 20 steps == 40 steps, and the same for Ctrl-C."""
    whole, killed, stopped = (tmp_path / name for name in ("whole", "killed", "stopped"))
    assert finish(start("train", tiny_file, *FORTY, *changes, "--out", whole))[0] == 0
    assert {r["router"]["dropped"] > 0 for r in steady(whole) if r["mode"] == "train"} == {True}

    process = start("train", tiny_file, *FORTY, *changes, "--out", killed, before=SLOWLY)
    wait_for(lambda: (killed / "checkpoints" / "step-20").is_dir() and num_lines(killed) > 24, process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(killed)] == ["step-20"]
    assert 22 < steady(killed)[-1]["step"] < 40
    code, out, err = finish(start("train", killed, "--resume"))
    assert (code, err) == (0, "")
    assert f"resuming {killed} after step 20" in out
    assert_same_run(killed, whole)

    process = start("train", tiny_file, *FORTY, *changes, "--out", stopped, before=SLOWLY)
    wait_for(lambda: num_lines(stopped) >= 5, process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 1
    assert err == f"ssmoe: stopped; the checkpoint is saved: go on with `ssmoe train {stopped} --resume`\n"
    [checkpoint] = list_checkpoints(stopped)
    assert checkpoint.name == f"step-{steady(stopped)[-1]['step']}"
    assert finish(start("train", stopped, "--resume"))[0] == 0
    assert_same_run(stopped, whole)


@pytest.mark.slow
def test_a_kill_inside_a_checkpoint_leaves_the_one_before(tiny_file, tmp_path):
    """A real SIGKILL at the moment when step 6 is written but not yet renamed."""
    code = (
        "import os, sys\n"
        "from ssmoe.training import checkpoint\n"
        "from ssmoe.cli.main import main\n"
        "replace = os.replace\n"
        "def die(a, b): os.kill(os.getpid(), 9) if 'step-6' in str(b) else replace(a, b)\n"
        "checkpoint.os.replace = die\n"
        "main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, "train", tiny_file, "--out", out], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(out)] == ["step-3"]
    assert (out / "checkpoints" / ".step-6.new").is_dir()
    assert find_weights(out).parent.name == "step-3"
    assert main(["train", str(out), "--resume"]) == 0
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-3", "step-6"]


def test_what_a_run_leaves_and_says(tiny_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(tiny_file), "train.steps=4"]) == 0
    folder = tmp_path / "runs" / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "environment.json",
        "loss.png",
        "metrics.jsonl",
        "report.html",
    ]
    shown = capsys.readouterr().out
    for words in (
        "weight decay: ",
        "no weight decay: ",
        "step      4/4",
        "held-out loss",
        "report: runs/tiny",
    ):
        assert words in shown
    assert main(["train", "runs/tiny", "--resume"]) == 0
    assert main(["train", str(tiny_file), "train.steps=5", "--overwrite"]) == 0
    assert steady(folder)[-1]["step"] == 5


def test_bad_input_writes_nothing(fails, tiny_file, tmp_path):
    out = tmp_path / "out"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    cases = [
        (("nowhere.toml",), ("no such file: nowhere.toml",)),
        (("runs/nowhere", "--resume"), ("runs/nowhere is not a run folder: there is no such folder",)),
        ((tmp_path,), (f"{tmp_path} is not a run folder: it has no config.json",)),
        (("moe-mamba-tiyn",), ("unknown preset 'moe-mamba-tiyn'; did you mean moe-mamba-tiny?",)),
        ((tiny_file, "train.stpes=3"), ("unknown key 'train.stpes'; did you mean train.steps?",)),
        ((tiny_file, "train.steps=0"), ("train.steps",)),
        ((tiny_file, "stray"), ("'stray' is not of the form key=value",)),
        ((tiny_file, "data.sources=nowhere.txt"), ("nowhere.txt",)),
        ((tiny_file, f"data.sources={empty}"), ("hold no text: name files that do",)),
        ((tiny_file, "model.vocab_size=200"), ("tokenizer has 257 tokens", "set model.vocab_size=257")),
        ((tiny_file, "data.context=100000"), ("set data.context to at most",)),
        ((tiny_file, "train.micro_batch_size=3"), ("does not divide batch_size=4", "use micro_batch_size=")),
        ((tiny_file, "train.backend=abacus"), ("backend='abacus' is not one of",)),
        ((tiny_file, "train.device=abacus"), ("device='abacus' is no device: use auto",)),
        ((tiny_file, "--resume"), ("does not exist, so there is nothing to resume: leave --resume away",)),
        ((tiny_file, "--resume", "--overwrite"), ("exclude each other: choose one",)),
    ]
    for argv, says in cases:
        fails("train", *argv, "--out", out, says=says)
        assert not out.exists()


def test_a_preset_is_all_that_train_needs(fails):
    fails("train", says=("are required: preset; see `ssmoe train --help`",), code=2)


def test_places_that_cannot_be_written(fails, tiny_file, tmp_path):
    fails(
        "train", tiny_file, "--out", tiny_file / "a" / "b", says=("not a folder that can be written", "--out")
    )
    fails("train", tiny_file, "--out", "/proc/nothing/here", says=("ssmoe: ",))
    cache = f"data.cache_dir={tiny_file}/cache"
    fails(
        "train", tiny_file, cache, "--out", tmp_path / "o", says=("name another folder with data.cache_dir",)
    )
    assert not (tmp_path / "o").exists()


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_existing_folder_stays_as_it_is(fails, trained, tiny_file, tmp_path):
    before = snapshot(trained)
    fails("train", trained, says=("exists: give --resume to go on, --overwrite to replace it",))
    fails("train", tiny_file, "--out", trained, says=("exists: give --resume",))
    fails(
        "train",
        trained,
        "train.steps=9",
        "--resume",
        says=("started with another train.steps", "--overwrite", f"train.init_from={trained}"),
    )
    fails("train", trained, "model.vocab_size=200", "--overwrite", says=("set model.vocab_size=257",))
    fails("train", trained, "data.context=100000", "--overwrite", says=("set data.context",))
    assert snapshot(trained) == before

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    for flag in ("--overwrite", "--resume"):
        fails("train", tiny_file, "--out", tmp_path / "thesis", flag, says=("is not a run folder",))
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_text_that_changed_is_not_resumed(fails, tiny_file, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text(f"document {number} " * 20)
    out = tmp_path / "out"
    assert main(["train", str(tiny_file), f"data.sources={text}", "--out", str(out)]) == 0
    (text / "9.txt").write_text("one more")
    before = snapshot(out)
    fails("train", out, "--resume", says=(f"the text of {out} has changed", "put the old text back"))
    assert snapshot(out) == before
    (text / "9.txt").unlink()
    assert main(["train", str(out), "--resume"]) == 0


def test_a_run_without_a_checkpoint_says_to_start_again(fails, tiny_file, tmp_path, trained):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "environment.json", "metrics.jsonl"):
        (out / name).write_bytes((trained / name).read_bytes())
    fails("train", out, "--resume", says=("has no checkpoint yet: start it again with --overwrite",))
    fails("eval", out, says=("holds no checkpoint: train it first",))
    fails("generate", out, "--prompt", "a", says=("holds no checkpoint: train it first",))


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"  {key.name}" in shown for key in all_keys())
    assert "train.precision=float32\n      One of float32, bfloat16. Compute dtype." in shown


def test_a_checkpoint_folder_is_no_run_and_the_way_to_train_on_is_told(fails, trained, tmp_path):
    shutil.copytree(find_weights(trained), tmp_path / "w")
    fails(
        "train", tmp_path / "w", says=("of a checkpoint folder, not of a run", f"init_from={tmp_path / 'w'}")
    )
