import json

from ssmoe.check import doctor
from ssmoe.cli.main import main
from ssmoe.ops import load
from tests.check.test_doctor import OPS


def test_a_healthy_machine(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "versions  python",
        "device    cpu",
        "auto is",
        f"reference: {len(OPS)} of {len(OPS)} ops ok",
        "healthy",
    ):
        assert words in shown
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"]
    assert {check["op"] for check in found["checks"]} == set(OPS)


def test_a_broken_kernel_is_exit_1(capsys, monkeypatch):
    ops = load("reference")

    def wrong(*args, **kwargs):
        return ops.expert_mlp(*args, **kwargs) * float("nan")

    monkeypatch.setattr(doctor, "BACKENDS", ("reference",))
    monkeypatch.setattr(doctor, "load", lambda name: ops._replace(expert_mlp=wrong))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "reference expert_mlp: FAILED (largest relative error nan" in shown
    assert f"reference: {len(OPS) - 1} of {len(OPS)} ops ok (nearest its limit: mamba_step" in shown
    assert "NOT healthy" in shown
    assert main(["doctor", "--json"]) == 1
    found = json.loads(
        capsys.readouterr().out, parse_constant=lambda word: (_ for _ in ()).throw(ValueError(word))
    )
    assert [check["op"] for check in found["checks"] if not check["passed"]] == ["expert_mlp"]
    assert found["checks"][2]["error"] is None
