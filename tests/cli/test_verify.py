import json

import pytest
import torch

from ssmoe.cli.main import main
from ssmoe.model.mixers.mamba import Mamba


def test_a_trained_run_holds(trained, capsys):
    assert main(["verify", str(trained)]) == 0
    shown = capsys.readouterr().out
    assert "layer 0 (Mamba)" in shown
    assert "checks hold" in shown
    assert main(["verify", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_a_planted_state_bug_fails_and_is_named(trained, capsys, monkeypatch):
    forward, step = Mamba.forward, Mamba.step
    monkeypatch.setattr(Mamba, "forward", lambda self, x, state=None, segments=None: forward(self, x))
    monkeypatch.setattr(
        Mamba, "step", lambda self, x, norm, state, dtype, **_: step(self, x, norm, None, dtype)
    )
    assert main(["verify", str(trained)]) == 1
    assert "FAILED reference float64, layer 0 (Mamba), one at a time" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mamba-tiny", []),
        ("mamba-tiny", ["model.pattern.mamba.learned_state=true"]),
        ("moe-mamba-tiny", []),
        ("moe-mamba-fine-tiny", []),
        ("rom-tiny", []),
    ],
)
def test_a_run_trained_on_the_gpu_holds_there(name, changes, text_folder, tmp_path, capsys):
    run = tmp_path / "run"
    data = [f'data.sources=["{text_folder}"]', "data.tokenizer=bytes", "data.context=64", "data.held_out=0.2"]
    sizes = ["model.vocab_size=257", "train.steps=20", "train.batch_size=4", "train.eval_rows=4"]
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    words = [*data, *sizes, *changes, cache, "train.device=cuda"]
    assert main(["train", name, "--out", str(run), *words]) == 0
    capsys.readouterr()
    assert main(["verify", str(run), "--device", "cuda", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert {row["backend"] for row in found["findings"]} >= {"reference float64", "triton float32"}


def test_bad_requests(fails, trained, tmp_path):
    fails("verify", tmp_path / "nowhere", says=("no such folder",))
    fails("verify", trained, "--length", "2", says=("--length at least 4",))
