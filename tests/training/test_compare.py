import json

import pytest

from ssmoe.config.count import count_parameters
from ssmoe.training.compare import check_comparable, compare_runs, write_comparison
from ssmoe.training.folder import create_folder


@pytest.fixture
def finished(tiny_run, tmp_path):
    """Makes a run folder from (step, seconds, held-out loss)."""

    def make(name, evaluations):
        path = tmp_path / name
        create_folder(path, tiny_run(f"name={name}"), "reference", data={})
        lines = [
            {"step": step, "mode": "eval", "tokens": 128 * step, "seconds": seconds, "held_out_loss": loss}
            for step, seconds, loss in evaluations
        ]
        lines.insert(0, {"step": 1, "mode": "train", "lm_loss": 9.0})
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return make


def test_the_match_is_the_first_evaluation_at_or_below_the_baselines_last(finished, tiny_run):
    folders = [
        finished("base", [(10, 1.0, 3.0), (20, 2.0, 2.5), (30, 3.0, 2.0), (40, 4.0, 2.25)]),
        finished("fast", [(10, 3.0, 2.25), (20, 6.0, 2.5), (30, 9.0, 1.5), (40, 12.0, 1.25)]),
        finished("never", [(10, 1.0, 4.0), (40, 4.0, 2.2501)]),
    ]
    found = compare_runs(folders, "base")
    assert found.target == 2.25
    base, fast, never = found.rows
    # the baseline itself was there at its third evaluation
    assert (base.match_step, base.steps_ratio, base.seconds_ratio) == (30, 1.0, 1.0)
    assert (fast.match_step, fast.match_tokens) == (10, 1280)
    assert (fast.steps_ratio, fast.seconds_ratio) == (3.0, 1.0)
    assert (fast.final_loss, fast.seconds) == (1.25, 12.0)
    assert never[5:] == (None, None, None, None)
    assert base.active == count_parameters(tiny_run().model).active
    assert compare_runs(folders, "fast").rows[0].match_step is None


def test_what_is_written(finished, tmp_path):
    folders = [finished("base", [(1, 1.0, 3.0)]), finished("other", [(1, 0.5, 2.0)])]
    write_comparison(compare_runs(folders, "base"), tmp_path)
    content = json.loads((tmp_path / "compare.json").read_text())
    assert (content["baseline"], content["target_loss"]) == ("base", 3.0)
    assert [row["seconds_ratio"] for row in content["rows"]] == [1.0, 2.0]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_evaluations_is_refused(finished):
    with pytest.raises(ValueError, match="no held-out evaluation yet"):
        compare_runs([finished("base", [])], "base")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.context=16", "data.context"),
        ("data.seed=3", "data.seed"),
        ("train.steps=7", "train.steps"),
        ("train.batch_size=8", "train.batch_size"),
        ("train.eval_every=2", "train.eval_every"),
        ("train.eval_rows=2", "train.eval_rows"),
        ("train.precision=bfloat16", "train.precision"),
        ("train.tbptt=2", "train.tbptt"),
        ("model.objective=masked", "model.objective"),
    ],
)
def test_runs_that_cannot_be_compared(tiny_run, override, key):
    with pytest.raises(ValueError, match=f"{key} is .* give {key}=... for all runs"):
        check_comparable([tiny_run("name=a"), tiny_run("name=b", override)], None)


def test_names_and_number(tiny_run):
    with pytest.raises(ValueError, match="at least two"):
        check_comparable([tiny_run()], None)
    with pytest.raises(ValueError, match="same name"):
        check_comparable([tiny_run(), tiny_run("train.seed=1")], None)
    with pytest.raises(ValueError, match="baseline 'c' is not one of"):
        check_comparable([tiny_run("name=a"), tiny_run("name=b")], "c")
    check_comparable([tiny_run("name=a"), tiny_run("name=b", "model.d_model=32", "train.seed=1")], "b")
