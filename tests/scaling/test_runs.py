import json

import pytest

from ssmoe.config.count import count_parameters
from ssmoe.config.load import preset
from ssmoe.scaling.runs import Point, common_kind, read_csv, read_points, read_run


def write_run(folder, *, name="moe-mamba-tiny", overrides=("train.steps=10",), lines=None):
    folder.mkdir(parents=True)
    run = preset(name, overrides)
    (folder / "config.json").write_text(run.model_dump_json())
    lines = lines or (
        {"step": 5, "tokens": 20480, "lm_loss": 6.0},
        {"step": 5, "tokens": 20480, "held_out_loss": 6.1},
        {"step": 10, "tokens": 40960, "lm_loss": 5.0},
        {"step": 10, "tokens": 40960, "held_out_loss": 5.2},
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_run_folder_is_a_point(tmp_path):
    run = write_run(
        tmp_path / "a",
        overrides=("train.steps=10", "model.pattern.moe.top_k=2", "model.pattern.moe.d_expert=64"),
    )
    point = read_run(tmp_path / "a")
    assert point == Point(
        str(tmp_path / "a"), count_parameters(run.model).non_embedding, 40960, 2, 5.2, 4.0, "mamba-moe"
    )


def test_transformers_and_dense_models_are_told_apart(tmp_path):
    write_run(tmp_path / "moe", name="transformer-moe-tiny")
    write_run(tmp_path / "dense", name="transformer-tiny")
    assert read_run(tmp_path / "moe").blocks == "moe"
    assert read_run(tmp_path / "dense")[-2:] == (None, "dense")
    # a Transformer's costs are not those of Mamba
    for name in ("mamba-tiny", "s4d-tiny"):
        write_run(tmp_path / name, name=name)
        assert read_run(tmp_path / name)[-2:] == (None, None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("moe-mamba-expert-choice-tiny", "expert_choice"),
        ("mot-mamba-tiny", "mot"),
        ("mamba-inner-moe-tiny", "mamba_experts"),
        ("moe-mamba-parallel-tiny", "parallel"),
    ],
)
def test_experts_that_no_law_is_about_are_refused(tmp_path, name, kind):
    write_run(tmp_path / "a", name=name)
    with pytest.raises(ValueError, match=f"has layers of kind {kind}: no law describes it"):
        read_run(tmp_path / "a")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"step": 5, "tokens": 1, "held_out_loss": 6.1}], "step 5 of 10"),
        ([{"step": 10, "tokens": 1, "lm_loss": 6.1}], "no held-out loss"),
        ([{"step": 10, "tokens": 1, "held_out_loss": float("nan")}], "held_out_loss = nan"),
    ],
)
def test_runs_that_cannot_be_used_say_why(tmp_path, lines, message):
    write_run(tmp_path / "a", lines=lines)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "a")


def test_one_model_of_several_granularities_is_no_point(tmp_path):
    moe = '{"kind": "moe", "num_experts": 4, "d_expert": 16, "top_k": %d}'
    write_run(tmp_path / "a", overrides=("train.steps=10", f"model.pattern=[{moe % 1}, {moe % 2}]"))
    with pytest.raises(ValueError, match="mixes MoE layers of several G or E"):
        read_run(tmp_path / "a")


def test_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        read_run(tmp_path)
    write_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="1 is not JSON"):
        read_run(tmp_path / "a")


def test_csv(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("name,N,D,G,loss,E\nsmall,1e6,2e7,1,4.5,8\n,2e6,2e7,2,4.1,\n")
    write_run(tmp_path / "a")
    points = read_points([path, tmp_path / "a"])
    assert points[0] == Point("small", 1e6, 2e7, 1, 4.5, 8.0)
    assert points[1].name.endswith("runs.csv:3")
    assert len(points) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N,D,loss\n1,2,3\n", "no column G"),
        ("N,D,G,loss\n1e6,1e7,1,-3\n", r"runs.csv:2: loss = '-3'"),
        ("N,D,G,loss\n1e6,x,1,3\n", "D = 'x'"),
        ("N,D,G,loss\n1e6,1e7,1\n", "loss = None"),
    ],
)
def test_csv_errors_name_line_and_column(tmp_path, text, message):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_csv(path)
    with pytest.raises(FileNotFoundError):
        read_csv(tmp_path / "none.csv")


def test_runs_of_different_kinds_are_not_one_law():
    a = Point("a", 1, 1, 1, 3, 8, "moe")
    assert common_kind([a, Point("b", 1, 1, 1, 3)]) == ("moe", 8)
    with pytest.raises(ValueError, match="mix mamba-moe, moe"):
        common_kind([a, a._replace(blocks="mamba-moe")])
    with pytest.raises(ValueError, match="E = 8, 16"):
        common_kind([a, a._replace(expansion=16)])
