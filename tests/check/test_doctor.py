import pytest
import torch

from ssmoe.check import doctor
from ssmoe.check.doctor import TOLERANCE, Check, diagnose, self_check
from ssmoe.ops import BACKENDS, load, missing

OPS = [
    "selective_scan",
    "causal_conv1d",
    "expert_mlp",
    "expert_linear",
    "linear",
    "residual_norm",
    "head_cross_entropy",
    "mamba_step",
]
ON_CPU = [name for name in BACKENDS if name != "triton" and not missing(name)]


def broken(op):
    """Ops of which one is wrong in the fifth digit, or gives no number."""
    ops = load("reference")

    def wrong(*args, **kwargs):
        out = getattr(ops, op)(*args, **kwargs)
        if isinstance(out, tuple):  # residual_norm's result is the second, after the stream as it was
            return tuple(part * 1.0001 for part in out)
        return out * 1.0001

    return ops._replace(**{op: wrong})


@pytest.mark.parametrize("backend", ON_CPU)
def test_every_backend_passes(backend):
    checks = self_check(load(backend), "cpu")
    assert [check.op for check in checks] == OPS
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("op", OPS)
def test_a_broken_op_is_found_and_named(op):
    assert [check.op for check in self_check(broken(op), "cpu") if not check.passed] == [op]


def test_what_is_no_number_has_failed():
    assert not Check("x", "y", float("nan")).passed
    assert Check("x", "y", TOLERANCE).passed


def test_a_nan_in_one_place_is_found():
    ops = load("reference")

    def torn(*args, **kwargs):
        y, state = ops.selective_scan(*args, **kwargs)
        return y.index_fill(1, torch.tensor([3]), float("nan")), state

    assert not self_check(ops._replace(selective_scan=torn), "cpu")[0].passed


def test_the_diagnosis_is_of_this_machine(monkeypatch):
    found = diagnose()
    assert found.healthy
    assert found.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert found.backends["cpu"].split(",")[0] in ON_CPU
    assert found.devices[0].startswith("cpu")
    assert {(check.backend, check.op) for check in found.checks} >= {(b, op) for b in ON_CPU for op in OPS}
    monkeypatch.setattr(doctor, "load", lambda name: broken("expert_mlp"))
    assert not diagnose().healthy
