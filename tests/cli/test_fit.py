import argparse
import json

import pytest

from ssmoe.cli import fit
from ssmoe.scaling import law
from tests.scaling.synthetic import beyond, draw


def run(*words):
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    return fit.run(parser.parse_intermixed_args([str(word) for word in words]))


def write(path, points):
    rows = [f"{p.parameters},{p.tokens},{p.granularity},{p.loss}" for p in points]
    path.write_text("\n".join(["N,D,G,loss", *rows]) + "\n")
    return path


@pytest.fixture
def csv(tmp_path):
    return write(tmp_path / "runs.csv", draw(0))


def test_table_law_and_picture(csv, tmp_path, capsys):
    held = write(tmp_path / "held.csv", beyond())
    output, picture = tmp_path / "law.json", tmp_path / "fit.png"
    words = ("--c", "0.47", "--blocks", "moe", "--expansion", "64", "--output", output, "--plot", picture)
    assert run(csv, "--held-out", held, *words) == 0
    out = capsys.readouterr().out
    for name in ("alpha", "gamma", "fixed", "120 runs", "held-out error"):
        assert name in out
    found = law.load(output)
    assert found.expansion == 64
    assert found.intervals["alpha"][0] < 0.115 < found.intervals["alpha"][1]
    assert picture.is_file()


def test_json(csv, tmp_path, capsys):
    assert run(csv, "--held-out", csv, "--json", "--method", "multistart", "--resamples", "50") == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values["profile"]) == set(values["bootstrap"]) == {"a", "alpha", "b", "beta", "g", "gamma"}
    assert len(values["runs"]) == len(values["held_out"]) == 120
    assert values["coefficients"]["c"] == 0.472


def test_what_cannot_be_is_one_clear_error(csv, tmp_path):
    with pytest.raises(ValueError, match="--c -1"):
        run(csv, "--c=-1")
    with pytest.raises(ValueError, match="--blocks and --expansion"):
        run(csv, "--output", tmp_path / "x.json")
    with pytest.raises(ValueError, match="--blocks and --expansion belong to --output"):
        run(csv, "--blocks", "dense")
    with pytest.raises(ValueError, match="--expansion 0: give a number of at least 1"):
        run(csv, "--blocks", "moe", "--expansion", "0", "--output", tmp_path / "x.json")
    with pytest.raises(ValueError, match="too few"):
        run(write(tmp_path / "few.csv", draw(0)[:4]))
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "missing")
