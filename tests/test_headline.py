"""The headline experiment: its rules, its bookkeeping, its runner on a CPU, and its pages."""

import json
import os
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
import torch

from ssmoe.config.differences import differences
from ssmoe.config.load import preset
from ssmoe.ops.reference.cross_entropy import IGNORE

ROOT = Path(__file__).parents[1]
HEADLINE = ROOT / "experiments" / "headline"
STAGES = sorted((HEADLINE / "stages").glob("*.toml"))
sys.path.insert(0, str(HEADLINE))

import copying  # noqa: E402
import corpus  # noqa: E402
import page  # noqa: E402
import plan  # noqa: E402
import prose  # noqa: E402
import results  # noqa: E402
import rules  # noqa: E402
import run as runner  # noqa: E402
import schedule  # noqa: E402
import worker  # noqa: E402

MINI = """
tokens = 2048
evaluations = 4
baseline = "mamba-tiny"
shared = [
  "data.tokenizer=bytes", "model.vocab_size=257", "data.context=32", "model.d_model=16",
  "train.batch_size=4", "train.eval_rows=4", "train.average=0.1", "train.threads=1",
]

[recipes]
plain = []
muon = ["train.optimizer=muon"]

[[run]]
name = "mamba"
side = "mamba"
preset = "mamba-tiny"
recipe = ["plain", "muon"]
learning_rates = [2e-3]
priority = 1

[[run]]
name = "fine"
side = "moe-mamba"
preset = "moe-mamba-tiny"
recipe = "best"
set = ["model.pattern.moe.num_experts=4", "model.pattern.moe.d_expert=104"]
learning_rates = [2e-3]

[[run]]
name = "squared"
on = "fine"
group = "activation"
recipe = "best"
set = ["model.pattern.moe.activation=relu_squared"]
learning_rates = [2e-3]

[[promote]]
side = "mamba"
top = 1
tokens = 4096

[[promote]]
side = "moe-mamba"
combine = "fine"
top = 1
tokens = 4096
"""


def made(name="run", steps=4, losses=(4.0, 3.0, 2.0, 1.0), seconds=1.0, **changes):
    """A result as the runner writes it."""
    rows = [[i + 1, 10 * (i + 1), loss, seconds * (i + 1), loss] for i, loss in enumerate(losses)]
    found = {
        "name": name,
        "entry": name,
        "stage": "final",
        "side": "mamba",
        "steps": steps,
        "tokens": 10 * steps,
    }
    found |= {
        "status": "done",
        "one_sided": False,
        "seed": 0,
        "evaluations": rows,
        "active": 10,
        "differs": [],
    }
    found |= {"non_embedding": 20, "learning_rate": 0.1, "tokens_per_second": 5, "breaks": [], "recipe": None}
    found |= {"note": "", "date": "2026-01-01T00:00:00", "occupied_seconds": 60.0, "preset": "x"}
    found["environment"] = {"device": "H", "torch": "2", "git": "x", "train_tokens": 1}
    return found | changes


@pytest.mark.parametrize(
    "override",
    ["train.optimizer=muon", "train.batch_size=32", "data.seed=1", "train.schedule=linear",
     "model.norm=rmsnorm", "train.steps=7", "train.average=0.1", "train.weight_decay=0", "data.context=512"],
)  # fmt: skip
def test_a_setting_that_only_one_side_has_breaks_the_rules(override: str) -> None:
    run = preset("moe-mamba-25m", ["train.learning_rate=0.001"])
    assert rules.violations(run, preset("mamba-25m")) == []
    key = override.partition("=")[0]
    found = rules.violations(preset("moe-mamba-25m", [override]), preset("mamba-25m"))
    assert len(found) == 1
    assert found[0].startswith(key)


def test_more_active_parameters_break_the_rules() -> None:
    run = preset("moe-mamba-25m", ["model.pattern.moe.d_expert=3072"])
    assert "active parameters" in rules.violations(run, preset("mamba-25m"))[0]


def test_attention_on_one_side_alone_breaks_the_rules() -> None:
    layers = [{"kind": "mamba"}, {"kind": "attention", "num_heads": 8}]
    with_it = preset("mamba-25m", [f"model.pattern={json.dumps(layers)}"])
    without, moe = preset("mamba-25m"), preset("moe-mamba-25m")
    assert rules.pair_violations(moe, without) == rules.pair_violations(with_it, with_it) == []
    assert rules.pair_violations(moe, with_it) == [
        "attention layers: 0 here and 16 in the Mamba: give both sides some, or neither"
    ]
    assert "16 here and 0" in rules.pair_violations(with_it, without)[0]
    longer, faster = (
        with_it.model_copy(update={"train": with_it.train.model_copy(update=change)})
        for change in ({"steps": 7}, {"learning_rate": 0.5})
    )
    even = [("mamba", with_it), ("moe-mamba", with_it), ("mamba", without), ("mamba", longer)]
    assert rules.budget_violations(even) == []
    assert "mamba 2, moe-mamba 1" in rules.budget_violations([*even, ("mamba", faster)])[0]
    assert "moe-mamba 0, mamba 1" in rules.budget_violations([("moe-mamba", without), ("mamba", with_it)])[0]


def test_what_may_differ_is_told() -> None:
    run = preset("moe-mamba-25m", ["model.init.expert_fan_in=expert"])
    text = "\n".join(rules.describe(run, preset("mamba-25m")))
    for part in ("model.pattern: [mamba] -> [mamba] [moe", "model.init.expert_fan_in", "27.13M -> 26.33M"):
        assert part in text


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_every_stage_keeps_the_rules(path: Path) -> None:
    stage = plan.Stage(path)
    tries = [*stage.tries, *stage.with_recipe(None)]
    assert tries
    runner.check_budget(stage)
    for one in tries:
        assert one.one_sided == bool(rules.violations(one.config, one.reference)), one.name


def test_a_match_is_the_first_evaluation_at_or_below_and_nothing_between() -> None:
    baseline = made(losses=(5.0, 4.0, 3.0, 2.5))
    assert results.match(made(losses=(4.0, 2.6, 2.5, 2.0)), baseline) == (3, 3.0, 4 / 3, 4 / 3)
    assert results.match(made(losses=(4.0, 2.4, 2.5, 2.0), seconds=2.0), baseline) == (2, 4.0, 2.0, 1.0)
    assert results.match(made(losses=(4.0, 3.0, 2.6, 2.51)), baseline) is None
    last = made(losses=(4.0, 3.0, 2.6, 2.4))
    last["evaluations"] = [[*row[:5], row[2] - 0.5] for row in last["evaluations"]]
    assert results.match(last, last, results.LAST) == (4, 4.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="equal length"):
        results.match(made(steps=8), baseline)


def test_the_tuned_mamba_is_the_lowest_of_its_length_and_never_one_sided() -> None:
    runs = [
        made("a", losses=(3.0, 2.0)),
        made("b", losses=(3.0, 1.0)),
        made("c", losses=(3.0, 0.5), one_sided=True),
        made("d", losses=(3.0, 0.1), steps=8),
        made("e", losses=(3.0, 0.1), side="moe-mamba"),
    ]
    assert results.tuned(runs[4], runs) is runs[1]


def test_compiling_is_left_out_of_the_seconds() -> None:
    steps = [5.0, 3.0, *[1.0] * 28]
    times = [sum(steps[:i]) for i in range(len(steps) + 1)]
    found = worker.without_compiling(times)
    assert found[-1] == pytest.approx(30.0)
    assert found[10] == pytest.approx(10.0)
    assert worker.without_compiling(times[:15]) == times[:15]


def test_factors_that_helped_are_combined(tmp_path: Path) -> None:
    path = tmp_path / "mini.toml"
    path.write_text(MINI)
    stage = plan.Stage(path)
    losses = {"mamba-plain-lr0.002": 3.0, "fine-plain-lr0.002": 2.5, "squared-plain-lr0.002": 2.4}
    mamba, fine = (stage.promote(entry, losses, "plain")[0] for entry in stage.promotions)
    assert mamba.name == "mamba-plain-lr0.002-0.004096m"
    assert fine.name == "fine+squared-plain-lr0.002-0.004096m"
    assert fine.config.model.pattern[1].activation == "relu_squared"
    assert (mamba.config.train.steps, fine.config.train.steps) == (32, 32)
    fine = stage.promote(stage.promotions[1], losses | {"squared-plain-lr0.002": 2.6}, "plain")[0]
    assert fine.name == "fine-plain-lr0.002-0.004096m"


def test_a_pattern_is_spelled_by_letters() -> None:
    letters = {"m": {"kind": "mamba"}, "a": {"kind": "attention", "num_heads": 8}}
    pattern, repeat = plan.layers("2m a m", letters)
    layers = [letters["m"], letters["m"], letters["a"], letters["m"]]
    assert pattern == f"model.pattern={json.dumps(layers)}"
    assert repeat == "model.repeat=1"
    for wrong in ("2m b", "xm"):
        with pytest.raises(ValueError, match="is no number and letter of m, a"):
            plan.layers(wrong, letters)


def test_a_run_is_built_on_one_that_is_set_in_one_way(tmp_path: Path) -> None:
    path = tmp_path / "mini.toml"
    again = (
        MINI + '\n[[run]]\nname = "fine"\nside = "moe-mamba"\npreset = "moe-mamba-tiny"\nrecipe = "muon"\n'
    )
    path.write_text(again)
    with pytest.raises(ValueError, match="squared: runs called 'fine' are set differently"):
        plan.Stage(path)


def test_a_target_repeats_when_it_stands_after_the_same_two_tokens_as_before() -> None:
    row = torch.tensor([[1, 2, 3, 1, 2, 3, 2, 3, 1, 2, 4, 1, 2, 3]])
    again = copying.repeats(row[:, :-1], row[:, 1:], 5)
    assert again.tolist() == [[False] * 4 + [True] + [False] * 2 + [True, True] + [False] * 3 + [True]]
    ignored = row[:, 1:].clone()
    ignored[0, 4] = IGNORE
    assert int(copying.repeats(row[:, :-1], ignored, 5).sum()) == 3


def test_every_hundredth_piece_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    lines = [f"{number:07d} of the text\n" for number in range(125 * 4)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("".join(lines))
    tokenizer = tmp_path / "bytes" / "tokenizer.json"
    from ssmoe.data.tokenizer import ByteTokenizer

    ByteTokenizer().save(tokenizer.parent)
    found = corpus.prepare(tmp_path, tmp_path / "cache", tokenizer, processes=1, piece=4 * len(lines[0]))
    assert (found.train.num_documents, found.held_out.num_documents) == (123, 2)
    held = [bytes(found.held_out.document(i).astype("u1")).decode() for i in range(2)]
    assert held == ["".join(lines[40:44]), "".join(lines[440:444])]
    trained = "".join(bytes(found.train.document(i).astype("u1")).decode() for i in range(123))
    assert not set(trained.splitlines()) & set("".join(held).splitlines())
    again = corpus.prepare(tmp_path, tmp_path / "cache", tokenizer, piece=4 * len(lines[0]))
    assert again.content_hash == found.content_hash


def test_a_known_run_keeps_its_own_record_and_lends_it_to_others(tmp_path: Path) -> None:
    path = tmp_path / "mini.toml"
    path.write_text(MINI)
    stage = plan.Stage(path)
    first = stage.tries[0]
    known = made(
        first.name,
        entry=first.entry["name"],
        stage=stage.name,
        configuration=first.config.model_dump(mode="json"),
    )
    queue = schedule.Queue([stage], tmp_path / "own", lambda one: one, deadline=inf, speed=1.0, known=[known])
    assert results.read(queue.path(first)) == known
    other = known | {"name": "elsewhere", "stage": "older"}
    queue = schedule.Queue(
        [stage], tmp_path / "lent", lambda one: one, deadline=inf, speed=1.0, known=[other]
    )
    assert results.read(queue.path(first)) == known | {"run_as": "older/elsewhere"}


@pytest.mark.slow
def test_a_stage_runs_on_a_cpu_waits_promotes_and_goes_on(tmp_path: Path, text_folder: Path) -> None:
    path = tmp_path / "mini.toml"
    path.write_text(
        MINI.replace("shared = [", f'shared = [\n  "data.sources={text_folder}", "data.held_out=0.2",')
    )
    command = [sys.executable, HEADLINE / "run.py", path, "--out", tmp_path / "out", "--gpus", "cpu"]
    command += ["--set", f"data.cache_dir={tmp_path / 'cache'}", "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    first = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    found = {run["name"]: run for run in results.collect(tmp_path / "out")}
    assert len(found) == 6
    assert {run["status"] for run in found.values()} == {"done"}
    assert sum(run["steps"] == 32 for run in found.values()) == 2
    for run in found.values():
        assert run["breaks"] == []
        assert [row[0] for row in run["evaluations"]][-1] == run["steps"]
        number = sum(count for _, count in run["parts"].values())
        nats = sum(loss * count for loss, count in run["parts"].values())
        assert nats / number == pytest.approx(run["evaluations"][-1][2], abs=1e-3)
    assert "model.pattern: [mamba] -> [mamba] [moe" in json.dumps(found)
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert again.returncode == 0, again.stderr
    assert "held-out 5" not in again.stdout.split("run ")[0]


def test_the_page_and_the_readme_say_what_the_results_say() -> None:
    folder = ROOT / "docs" / "results"
    runs = json.loads((folder / page.DATA).read_text())
    text = (folder / page.PAGE).read_text()
    assert page.replace(text, page.tables(runs, page.inference(folder))) == text
    readme = (ROOT / "README.md").read_text()
    assert page.replace(readme, {"headline": page.for_readme(runs)}) == readme
    assert readme.index("<!-- headline -->") < 2500


def test_the_headline_counts_every_seed() -> None:
    runs = [made(page.MAMBA, seed=s, losses=(5, 4, 3, 2)) for s in range(3)]
    runs += [made(page.FINE, seed=s, side="moe-mamba", losses=(5, 2, 1.5, 1)) for s in range(2)]
    runs += [made(page.FINE, seed=2, side="moe-mamba", losses=(5, 4, 2, 1))]
    text = page.headline(runs)[0]
    assert "in 1.78 (1.33 to 2.00) times fewer steps" in text
    assert "3 seeds" in text
    runs[-1]["evaluations"][-2:] = [[3, 30, 4.0, 3.0, 4.0], [4, 40, 3.0, 4.0, 3.0]]
    assert "2 of 3 seeds" in page.headline(runs)[0]


def test_the_pair_without_attention_is_told_beside_the_headline() -> None:
    runs = [made(page.MAMBA, losses=(5, 4, 3, 2)), made(page.FINE, losses=(5, 3, 2, 1))]
    assert len(page.headline(runs)) == 1
    runs += [made("mamba", losses=(6, 5, 4, 3)), made("open", losses=(6, 3, 2, 1), seconds=2.0)]
    assert "without them on either side it is 2.00 times fewer steps and 1.00 times" in page.headline(runs)[1]
    assert "Without attention layers on either side:" in page.seeds_table(runs)
    runs[-1]["evaluations"] = runs[-2]["evaluations"][:-1]
    assert len(page.headline(runs)) == 1


def test_a_run_cut_after_its_match_is_told_and_not_counted() -> None:
    runs = [made(page.MAMBA, seed=s, losses=(5, 4, 3, 2)) for s in range(2)]
    runs += [
        made(page.FINE, losses=(5, 3, 2, 1)),
        made(page.FINE, seed=1, status="running", losses=(4, 2, 1)),
    ]
    text = page.headline(runs)
    assert "in 1.33 times fewer steps" in text[0]
    assert "1 seed," in text[0]
    assert "seed 1 is not counted" in text[1]
    assert "cut at step 3 of 4: it had matched 2.000 at step 2, 2.00 times fewer steps" in text[1]
    runs[-1]["evaluations"] = runs[-1]["evaluations"][:1]
    assert len(page.headline(runs)) == 1


def test_the_page_owns_up_to_runs_at_the_wrong_rate() -> None:
    runs = [
        made(f"r{i}", stage="search-4", learning_rate=rate) for i, rate in enumerate((0.008, 0.001, 0.0005))
    ]
    assert prose.slow_text(runs[:1]) == ""
    assert "2 runs of `search-4` had the rates of the bare presets, 0.001 and 0.0005" in prose.slow_text(runs)


def test_the_page_tells_where_attention_gains() -> None:
    names = ("mamba", "mamba-attention")
    parts = {"0-128 repeated": [1.25, 10], "0-128 new": [3.0, 90]}
    runs = [made(name, stage="search-4", parts=parts) for name in names]
    lines = page.attention_table(runs)
    assert lines[0] == "| targets | number | Mamba | Mamba with attention |"
    assert lines[2] == "| 0-128 repeated | 10 | 1.250 | 1.250 |"
    assert page.attention_table([]) == ["Not run yet."]


def test_the_shipped_presets_are_the_final_runs() -> None:
    made = {one.name: one for one in plan.Stage(HEADLINE / "stages" / "final.toml").tries}
    for name, shipped in ((page.FINE, "moe-mamba-fine-25m"), (page.MAMBA, "mamba-tuned-25m")):
        lengths = ["data.tokenizer=bpe:50257", "train.keep_checkpoints=0", "train.checkpoint_every=1000"]
        assert differences(preset(shipped, lengths), made[f"{name}-s0"].config) == {}
