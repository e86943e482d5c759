import torch

from ssmoe.check import doctor
from ssmoe.check.doctor import diagnose
from tests.check.test_numerics import ON_CPU, OPS, broken


def test_the_diagnosis_is_of_this_machine(monkeypatch):
    found = diagnose()
    assert found.healthy
    assert found.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert found.backends["cpu"].split(",")[0] in ON_CPU
    assert found.devices[0].startswith("cpu")
    assert {(check.backend, check.op) for check in found.checks} >= {(b, op) for b in ON_CPU for op in OPS}
    monkeypatch.setattr(doctor, "load", lambda name: broken("expert_mlp"))
    assert not diagnose().healthy
