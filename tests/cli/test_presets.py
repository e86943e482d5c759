import json

from ssmoe.cli.main import main
from ssmoe.config.load import preset_names


def test_every_preset_has_a_row(capsys):
    assert main(["presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == preset_names()
    assert all(row["total"] >= row["non_embedding"] >= row["active"] > 0 for row in rows)
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(rows)]] == preset_names()


def test_the_papers_figures(capsys):
    main(["presets"])
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert lines["moe-mamba-25m"][1:3] == ["542.2M", "26.3M"]
    assert lines["moe-mamba-100m"][1:3] == ["2439.1M", "117.5M"]
