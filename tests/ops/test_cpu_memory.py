"""Outputs of the CPU kernels are kept when freed, and no more of them than were in use at one time lately."""

import pytest

from tests.ops.test_cpu_extension import built, python

OUTPUTS = """
import torch
from ssmoe import ops
ops.load("cpu")
MIB = 1 << 20

def output(mib):
    x, weight = torch.ones(mib * 1024, 256), torch.ones(256)
    return torch.ops.ssmoe.row_norm(x, weight, None, 1e-5, torch.float32, False)[0]

kept = torch.ops.ssmoe.cpu_kept_memory
"""


def run(code: str) -> None:
    """In a process of its own, which has needed nothing yet."""
    found = python(OUTPUTS + code)
    assert found.returncode == 0, found.stderr


@built
def test_a_freed_block_is_handed_out_again() -> None:
    run("""
first = output(8)
place = first.data_ptr()
del first
assert kept() == 8 * MIB
again, other = output(8), output(8)
assert again.data_ptr() == place and other.data_ptr() != place and kept() == 0
""")


@built
def test_no_more_is_kept_than_was_in_use_at_one_time() -> None:
    run("""
for mib in (4, 8, 16, 32, 6, 12, 24):
    assert output(mib).sum().isfinite()
    assert kept() <= 32 * MIB
together = [output(16) for _ in range(4)]
del together
assert kept() == 64 * MIB
large = output(40)
assert kept() <= 24 * MIB
""")


@built
def test_a_block_keeps_its_size_when_a_smaller_tensor_had_it() -> None:
    run("""
larger = output(10)
del larger
smaller = output(8)
del smaller
assert kept() == 10 * MIB
torch.ops.ssmoe.cpu_release_memory()
assert kept() == 0
""")


@built
@pytest.mark.slow
def test_what_is_no_longer_needed_goes_after_a_while() -> None:
    run("""
import time
large = [output(32) for _ in range(4)]
del large
assert kept() == 128 * MIB
for _ in range(2):
    time.sleep(10.1)
    small = output(2)
    del small
assert kept() <= 2 * MIB
""")
