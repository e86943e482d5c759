import json

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
    forward = Mamba.forward
    monkeypatch.setattr(Mamba, "forward", lambda self, x, state=None, segments=None: forward(self, x))
    assert main(["verify", str(trained)]) == 1
    assert "FAILED reference float64, layer 0 (Mamba), one at a time" in capsys.readouterr().out


def test_bad_requests(fails, trained, tmp_path):
    fails("verify", tmp_path / "nowhere", says=("no such folder",))
    fails("verify", trained, "--length", "2", says=("--length at least 4",))
