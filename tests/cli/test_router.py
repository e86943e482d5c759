"""`ssmoe router`: a table, a picture and a page; refusals that name the remedy."""

import json

import pytest

import ssmoe
from ssmoe.cli.main import main
from tests.model.test_mode import run_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("router")
    run = run_config("fine", "moe-mamba-fine-tiny", folder, "train.steps=3", "model.repeat=2")
    return ssmoe.train(run, folder / "run")


def test_writes_a_table_a_picture_and_a_page(trained, tmp_path, capsys):
    assert main(["router", str(trained), "--rows", "4", "--out", str(tmp_path), "--text", "def f():"]) == 0
    shown = capsys.readouterr().out
    assert "load entropy" in shown
    assert "worst: layer" in shown
    assert (tmp_path / "router.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "router.html").read_text().count("<span") == 2 * len("def f():")


def test_json_holds_the_whole_matrix(trained, capsys):
    assert main(["router", str(trained), "--rows", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(report["load"]) for report in found["routers"]] == [64, 64]
    assert all(sum(report["load"]) == 4 * 32 * 8 for report in found["routers"])
    assert all(report["bias"] > 0 for report in found["routers"])
    assert (trained / "router.html").is_file()


def test_refusals(trained, tmp_path, capsys):
    assert main(["router", str(trained), "--text", ""]) == 1
    assert "--text is empty" in capsys.readouterr().err
    assert main(["router", str(tmp_path / "nothing")]) == 1
    plain = ssmoe.train(run_config("m", "mamba-tiny", tmp_path, "train.steps=1"), tmp_path / "run")
    assert main(["router", str(plain)]) == 1
    assert "has no router" in capsys.readouterr().err
