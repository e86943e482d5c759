import json

from ssmoe.cli.compare import _print, _ratio
from ssmoe.cli.main import main
from ssmoe.training.compare import Comparison, Row
from ssmoe.training.metrics import read_metrics


def second_file(tiny_file):
    """The same run with twice the experts' width."""
    path = tiny_file.with_name("wide.toml")
    path.write_text(tiny_file.read_text().replace("d_expert = 16", "d_expert = 32"))
    return path


def test_two_runs_end_to_end(tiny_file, tmp_path, capsys, fails):
    out = tmp_path / "compare"
    argv = ["compare", str(tiny_file), str(second_file(tiny_file)), "train.steps=9", "--out", str(out)]
    assert main([*argv, "--baseline", "wide", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    written = json.loads((out / "compare.json").read_text())
    assert written["rows"] == found["rows"]
    assert (out / "compare.png").is_file()
    assert [row["name"] for row in found["rows"]] == ["tiny", "wide"]
    wide = [r for r in read_metrics(out / "wide") if r["mode"] == "eval"]
    assert found["target"] == wide[-1]["held_out_loss"]
    assert [r["step"] for r in wide] == [3, 6, 9]
    assert found["rows"][1]["steps_ratio"] == 1.0
    # both have read the same text
    tokens = [[r["tokens"] for r in read_metrics(out / name)] for name in ("tiny", "wide")]
    assert tokens[0] == tokens[1]

    fails(*argv, says=("exists: give --resume to go on",))
    assert main([*argv, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "to the final held-out loss of tiny" in shown
    assert "unlike tiny: model.pattern is [mamba d_state=4] [moe num_experts=4 d_expert=32" in shown
    assert "compare.json" in shown


def test_a_half_finished_comparison_goes_on(tiny_file, tmp_path, capsys):
    out = tmp_path / "compare"
    assert main(["train", str(tiny_file), "--out", str(out / "tiny")]) == 0
    before = (out / "tiny" / "metrics.jsonl").read_bytes()
    assert main(["compare", str(tiny_file), str(second_file(tiny_file)), "--out", str(out), "--resume"]) == 0
    assert (out / "tiny" / "metrics.jsonl").read_bytes() == before
    assert (out / "compare.json").is_file()


def test_nothing_is_trained_when_one_run_will_not_do(tiny_file, tmp_path, fails):
    out, wide = tmp_path / "compare", second_file(tiny_file)
    fails("compare", tiny_file, "--out", out, says=("at least two",))
    fails("compare", tiny_file, tiny_file, "--out", out, says=("same name",))
    fails("compare", tiny_file, wide, "--baseline", "x", "--out", out, says=("baseline 'x'",))
    wide.write_text(wide.read_text().replace("vocab_size = 257", "vocab_size = 256"))
    fails("compare", tiny_file, wide, "--out", out, says=("set model.vocab_size=257",))
    wide.write_text(wide.read_text().replace("context = 32", "context = 16"))
    fails("compare", tiny_file, wide, "--out", out, says=("data.context is 32 in tiny and 16 in wide",))
    assert not out.exists()

    (out / "wide").mkdir(parents=True)
    (out / "wide" / "mine").write_text("")
    fails(
        "compare", tiny_file, second_file(tiny_file), "--out", out, "--overwrite", says=("not a run folder",)
    )
    assert not (out / "tiny").exists()


def test_a_ratio_below_one_is_told_the_other_way_round():
    assert _ratio(1.25, "fewer steps", "the steps") == "1.25 times fewer steps"
    assert _ratio(0.8, "less time", "the time") == "1.25 times the time"


def test_a_page_of_80_columns_has_room_for_every_number_and_the_presets_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        Row("mamba-tuned-tiny", 947_712, 1_472_000, 3.2806, 116.0, 500, 2_048_000, 1.0, 1.0),
        Row("moe-mamba-tuned-tiny", 940_000, 785_000_000, 3.1965, 150.0, None, None, 1.14, None),
        Row("x" * 40, 1, 1, 3.0, 1.0, 1, 1, 2.0, 2.0),
    ]
    _print(Comparison("mamba-tuned-tiny", 3.2806, rows, []), "out")
    table, _, _ = capsys.readouterr().out.partition("x" * 40 + " reaches")
    lines = [line.split() for line in table.splitlines()]
    assert ["mamba-tuned-tiny", "0.95M", "1.47M", "3.2806", "116", "500", "1.00x", "1.00x"] in lines
    assert ["moe-mamba-tuned-tiny", "0.94M", "785.00M", "3.1965", "150", "never", "1.14x", "-"] in lines
    assert sum(line[0].count("x") for line in lines if line and set(line[0]) == {"x"}) == 40
    assert max(map(len, table.splitlines())) <= 80
