import pytest
import torch

from ssmoe.check.numerics import NARROW, TOLERANCE, Check, self_check
from ssmoe.ops import BACKENDS, Ops, load, missing
from tests.ops.test_triton_interpreter import interpreted

OPS = set(Ops._fields) - {"name"}
ON_CPU = [name for name in BACKENDS if name != "triton" and not missing(name)]
IN_PLACE = ("adamw_step", "muon_step")
INTERPRETED = """
import sys
import torch
from ssmoe.check.numerics import self_check
from ssmoe.ops import load

ops = load("triton")
sys.modules["ssmoe.ops.triton.muon_step"].DTYPE = torch.float32
for check in self_check(ops, "cpu"):
    print(check.op, check.error, check.passed)
"""


def broken(op):
    """Ops of which one is wrong in the fifth digit, or, where that is allowed, in the first."""
    ops, factor = load("reference"), 1 + 2 * NARROW if op == "muon_step" else 1.0001

    def wrong(*args, **kwargs):
        out = getattr(ops, op)(*args, **kwargs)
        if op in IN_PLACE:
            return args[0][0].mul_(factor)
        if op == "route":
            return out._replace(weight=out.weight * factor)
        if isinstance(out, tuple):  # residual_norm's result is the second, after the stream as it was
            return tuple(part * factor if isinstance(part, torch.Tensor) else part for part in out)
        return out * factor

    return ops._replace(**{op: wrong})


@pytest.mark.parametrize("backend", ON_CPU)
def test_every_op_of_every_backend_is_checked_and_passes(backend):
    checks = self_check(load(backend), "cpu")
    assert {check.op for check in checks} == OPS
    assert len(checks) == len(OPS)
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_broken_op_is_found_and_named(op):
    assert [check.op for check in self_check(broken(op), "cpu") if not check.passed] == [op]


def test_a_wrong_choice_is_found():
    """The right numbers for the wrong experts, and one column beside the largest."""
    ops = load("reference")

    def swapped(*args, **kwargs):
        return ops.route(*args, **kwargs)._replace(expert=ops.route(*args, **kwargs).expert.flip(1))

    checks = self_check(ops._replace(route=swapped, argmax=lambda x: ops.argmax(x.flip(1))), "cpu")
    assert {check.op for check in checks if not check.passed} == {"route", "argmax"}


def test_what_is_no_number_has_failed():
    assert not Check("x", "y", float("nan")).passed
    assert Check("x", "y", TOLERANCE).passed


def test_a_nan_in_one_place_is_found():
    ops = load("reference")

    def torn(*args, **kwargs):
        y, state = ops.selective_scan(*args, **kwargs)
        return y.index_fill(1, torch.tensor([3]), float("nan")), state

    assert not self_check(ops._replace(selective_scan=torn), "cpu")[0].passed


@pytest.mark.slow
def test_the_gpu_kernels_pass_in_the_interpreter():
    pytest.importorskip("triton", reason="the Triton interpreter needs triton: pip install triton")
    found = [line.split() for line in interpreted("-c", INTERPRETED).splitlines()]
    assert {op for op, _, _ in found} == OPS
    assert [line for line in found if line[2] != "True"] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_kernels_pass():
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    assert [check for check in self_check(load("triton"), "cuda") if not check.passed] == []
