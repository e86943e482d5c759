"""What Triton's launches share."""

import weakref

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton: pip install triton")

from ssmoe.ops.triton.launch import counters


def test_counters_are_kept_when_more_are_needed() -> None:
    x = torch.empty(1)
    few = counters(x, 3)
    held, size = weakref.ref(few), few.numel()
    assert counters(x, size) is few
    many = counters(x, size + 1)
    assert many.numel() > size
    assert not many.any()
    # a captured graph holds its address alone
    del few
    assert held() is not None
    assert counters(x, 3) is many
