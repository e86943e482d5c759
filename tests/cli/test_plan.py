"""Done-when 4 and 5 of the issue, through the command's own modules."""

import argparse
import json
import resource
import subprocess
import sys

import pytest

from ssmoe.cli import plan
from ssmoe.config.load import load_run


def run(*words):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return plan.run(parser.parse_args(words))


def test_five_lines_and_a_preset_that_loads(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    assert run("--law", "ssm", "--flops", "1e18", "--output", str(path)) == 0
    out, err = capsys.readouterr()
    assert len(out.strip().splitlines()) == 5
    assert "warning: law ssm" in err
    made = load_run(str(path))
    assert made.name == "mine"
    assert [layer.kind for layer in made.model.pattern] == ["mamba", "moe"]


def test_it_answers_within_a_second_and_without_torch():
    code = (
        "import argparse, sys; from ssmoe.cli import plan; parser = argparse.ArgumentParser();"
        "plan.add_arguments(parser); plan.run(parser.parse_args(['--flops', '1e20']));"
        "print({'torch', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    # processor time, which other processes on the machine do not stretch
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.strip().endswith("set()")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_json_has_every_number(capsys):
    assert run("--gpu", "H200", "--hours", "10", "--mfu", "0.35", "--num-gpus", "8", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["seconds"] == pytest.approx(36000)
    assert values["law"] == "moe-64"
    assert values["run"]["train"]["steps"] == values["steps"]


def test_a_fitted_law_can_plan(tmp_path, capsys):
    from ssmoe.scaling import law, published

    law.save(published.SSM.model_copy(update={"name": "mine"}), tmp_path / "mine.json")
    assert (
        run("--law", str(tmp_path / "mine.json"), "--flops", "1e18", "--plot", str(tmp_path / "a.png")) == 0
    )
    assert "law mine" in capsys.readouterr().out
    assert (tmp_path / "a.png").is_file()


def test_a_ladder_is_files_that_load(tmp_path, capsys):
    words = (
        "--ladder",
        str(tmp_path),
        "--flops",
        "1e14",
        "--widths",
        "64",
        "96",
        "--granularities",
        "1",
        "2",
        "4",
        "--held-out-levels",
        "4",
        "6",
    )
    assert run(*words) == 0
    assert "24 runs to fit and 4 larger" in capsys.readouterr().out
    files = sorted(tmp_path.glob("*.toml"))
    assert len(files) == 28
    assert [file.stem[-3:] for file in files if file.stem.startswith("held-out")] == ["t04", "t06"] * 2
    for file in files:
        assert load_run(str(file)).model.pattern[0].kind == "mamba"
    assert run("--ladder", str(tmp_path / "b"), "--flops", "1e15", "--law", "dense", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["held_out"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no budget"),
        (("--flops", "0"), "--flops 0"),
        (("--flops", "-1e20"), r"--flops -1e\+20: give a positive"),
        (("--flops", "1e20", "--law", "mope"), "unknown law 'mope'"),
        (("--flops", "1e20", "--law", "no.json"), "no such law file"),
        (("--flops", "1e20", "--hours", "3"), "both set the compute"),
        (("--flops", "1e20", "--params", "1e8", "--tokens", "1e8"), "caps contradict"),
        (("--flops", "1e20", "--widths", "64"), "--widths belongs to --ladder"),
        (("--flops", "1e20", "--held-out-levels", "2"), "--held-out-levels belongs to --ladder"),
        (("--ladder", "x"), "--ladder needs --flops"),
        (("--ladder", "x", "--flops", "1e15", "--tokens", "5"), "--tokens does not apply"),
        (("--ladder", "x", "--flops", "1e9"), "too little"),
    ],
)
def test_what_cannot_be_is_one_clear_error(words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*words)
