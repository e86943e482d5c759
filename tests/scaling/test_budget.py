"""Done-when 5 of the issue: out of range, negative, zero or contradictory budgets."""

import pytest

from ssmoe.scaling.budget import Budget


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(), "no budget"),
        (Budget(flops=0), r"--flops 0: give a positive"),
        (Budget(flops=-1e20), r"--flops -1e\+20"),
        (Budget(flops=float("nan")), "--flops nan"),
        (Budget(flops=float("inf")), "--flops inf"),
        (Budget(flops=1e20, max_parameters=-1), "--params -1"),
        (Budget(flops=1e20, memory_gb=0), "--memory 0"),
        (Budget(flops=1e20, max_tokens=0), "--tokens 0"),
        (Budget(flops=1e20, hours=5, gpu="H200", mfu=0.4), "--flops and --hours both"),
        (Budget(hours=5), "--hours needs --gpu"),
        (Budget(hours=5, gpu="H200"), "--hours needs --gpu and a measured --mfu"),
        (Budget(hours=0, gpu="H200", mfu=0.4), "--hours 0"),
        (Budget(hours=5, gpu="H200", mfu=40), "fraction of the peak"),
        (Budget(hours=5, gpu="H200", mfu=-0.1), "--mfu -0.1"),
        (Budget(hours=5, gpu="H2OO", mfu=0.4), "did you mean H200"),
        (Budget(hours=5, gpu="H200", mfu=0.4, num_gpus=0), "--num-gpus 0"),
        (Budget(flops=1e20, num_gpus=8), "needs --gpu"),
        (Budget(flops=1e20, mfu=0.4), "--mfu needs --gpu"),
        (Budget(flops=1e20, gpu="H200"), "needs a measured --mfu"),
        (Budget(gpu="H200", mfu=0.4), "how much may it compute"),
        (Budget(max_tokens=1e9), "both a cap on the model"),
        (Budget(max_parameters=1e9), "both a cap on the model"),
    ],
)
def test_budgets_that_cannot_be_are_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        budget.check()


def test_hours_become_flops():
    budget = Budget(gpu="h200", hours=10, mfu=0.4, num_gpus=2)
    budget.check()
    assert budget.total_flops == pytest.approx(2 * 10 * 3600 * 0.4 * 989e12)
    assert budget.counts_head


def test_the_tightest_cap_counts_and_a_gpu_s_memory_is_one():
    assert Budget(flops=1e20).most_parameters is None
    assert Budget(flops=1e20, max_parameters=2e9, memory_gb=16).most_parameters == 1e9
    assert Budget(flops=1e20, max_parameters=5e8, memory_gb=16).most_parameters == 5e8
    on_gpu = Budget(gpu="H200", hours=1, mfu=0.4, num_gpus=4)
    assert on_gpu.most_parameters == pytest.approx(4 * 141e9 * 0.8 / 16)
    assert on_gpu.parameter_cap == "the memory of 4 H200"
