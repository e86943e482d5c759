"""Transition tuning: a run that mixes tokens goes on as token choice with the same weights, and generates."""

from pathlib import Path

import pytest

import ssmoe
from ssmoe.config.load import RunConfig
from ssmoe.training.metrics import read_metrics

TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\n"


def run_config(name: str, preset: str, folder: Path, *overrides: str) -> RunConfig:
    (folder / "text").mkdir(exist_ok=True)
    for i in range(12):
        (folder / "text" / f"{i}.py").write_text(f"# file {i}\n" + TEXT * 20)
    return ssmoe.preset(
        preset,
        [
            f"name={name}",
            "model.d_model=16",
            f"data.sources={folder / 'text'}",
            "data.tokenizer=bytes",
            "data.held_out=0.2",
            f"data.cache_dir={folder / 'cache'}",
            "data.context=32",
            "train.batch_size=8",
            "train.eval_rows=8",
            "train.eval_every=30",
            "train.learning_rate=0.01",
            *overrides,
        ],
    )


@pytest.mark.parametrize(
    ("preset", "kind"), [("mot-mamba-tiny", "mot"), ("moe-mamba-expert-choice-tiny", "expert_choice")]
)
def test_a_mixture_becomes_token_choice_and_generates(preset: str, kind: str, tmp_path: Path) -> None:
    first = run_config("first", preset, tmp_path, "train.steps=60", f"model.pattern.{kind}.balance=none")
    folder = ssmoe.train(first, tmp_path / "first")
    with pytest.raises(ValueError, match=f"model.pattern.{kind}.mode=token_choice"):
        ssmoe.generate(*ssmoe.load(folder), ["def "], max_new_tokens=4)
    before = [line for line in read_metrics(folder) if line["mode"] == "eval"][-1]
    assert before["held_out_loss_token_choice"] != before["held_out_loss"]

    second = run_config(
        "second",
        preset,
        tmp_path,
        "train.steps=30",
        f"train.init_from={folder}",
        f"model.pattern.{kind}.mode=token_choice",
        f"model.pattern.{kind}.balance=bias",
    )
    tuned = ssmoe.train(second, tmp_path / "second")
    lines = read_metrics(tuned)
    assert "held_out_loss_token_choice" not in lines[-1]
    assert lines[-1]["held_out_loss"] < before["held_out_loss_token_choice"]
    # the first step starts from the mixture's weights, not from scratch
    assert lines[0]["lm_loss"] < 3 < read_metrics(folder)[0]["lm_loss"]
    done = ssmoe.generate(*ssmoe.load(tuned), ["def ", "    return "], max_new_tokens=5, temperature=0)
    assert all(done.texts)


def test_another_model_is_no_start(tmp_path: Path) -> None:
    folder = ssmoe.train(run_config("first", "mamba-tiny", tmp_path, "train.steps=1"), tmp_path / "first")
    other = run_config("other", "moe-mamba-tiny", tmp_path, f"train.init_from={folder}")
    with pytest.raises(ValueError, match="is not of this model"):
        ssmoe.train(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_masked_model_trains_and_is_scored_on_hidden_tokens(tmp_path: Path) -> None:
    run = run_config("masked", "mot-masked-tiny", tmp_path, "train.steps=60", "model.vocab_size=258")
    lines = read_metrics(ssmoe.train(run, tmp_path / "masked"))
    losses = [line["lm_loss"] for line in lines if line["mode"] == "train"]
    assert losses[-1] < losses[0] - 1
    assert lines[-1]["held_out_targets"] == 8 * round(0.15 * 32)
    assert lines[-1]["held_out_loss_token_choice"] > 0


def test_the_hiding_token_must_be_free(tmp_path: Path) -> None:
    run = run_config("masked", "mot-masked-tiny", tmp_path, "model.vocab_size=257")
    with pytest.raises(ValueError, match=r"set model.vocab_size=258"):
        ssmoe.train(run, tmp_path / "masked")
