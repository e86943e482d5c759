import pytest

from ssmoe.config.count import count_parameters, training_flops
from ssmoe.scaling.budget import BYTES_PER_PARAMETER, Budget
from ssmoe.scaling.plan import plan
from ssmoe.scaling.published import NAMES, laws


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flops", [1e17, 3e20])
def test_a_rounded_plan_stays_near_the_optimum_and_spends_the_budget(name, flops):
    made = plan(Budget(flops=flops), laws(name))
    assert made.flops == pytest.approx(flops, rel=1e-6)
    assert made.loss == pytest.approx(made.exact.loss, rel=0.01)
    assert made.run.model.d_model % 64 == 0
    train = made.run.train
    assert train.steps * train.batch_size * made.run.data.context == pytest.approx(made.tokens, rel=0.02)
    assert made.memory_bytes == BYTES_PER_PARAMETER * count_parameters(made.run.model).total


def test_the_plan_for_mamba_costs_what_count_says():
    made = plan(Budget(flops=1e19), laws("ssm"))
    per_token = training_flops(made.run.model, made.run.data.context, head=False)
    assert made.flops == pytest.approx(per_token * made.tokens)
    assert made.parameters == count_parameters(made.run.model).non_embedding
    assert [layer.kind for layer in made.run.model.pattern] == ["mamba", "moe"]


def test_hours_are_spent_with_the_head():
    made = plan(Budget(gpu="H200", hours=24, mfu=0.4), laws("ssm"))
    assert made.seconds == pytest.approx(24 * 3600)
    assert made.memory_bytes <= 0.8 * 141e9
    assert made.run.train.precision == "bfloat16"


def test_flops_on_a_gpu_have_a_time():
    made = plan(Budget(flops=1e18, gpu="H100", mfu=0.5), laws("ssm"))
    assert made.seconds == pytest.approx(made.flops_with_head / (0.5 * 989e12))


@pytest.mark.parametrize(
    "caps", [{"max_parameters": 1e9}, {"memory_gb": 16}, {"max_tokens": 5e9}, {"max_parameters": 3e8}]
)
@pytest.mark.parametrize("name", ["moe-64", "ssm", "joint", "dense"])
def test_caps_hold(caps, name):
    free, made = plan(Budget(flops=1e20), laws(name)), plan(Budget(flops=1e20, **caps), laws(name))
    stored = count_parameters(made.run.model).total
    if "max_tokens" in caps:
        assert made.tokens <= caps["max_tokens"]
    else:
        assert 0.7 * caps.get("max_parameters", 1e9) < stored <= caps.get("max_parameters", 1e9)
    assert made.loss >= free.loss - 1e-3


def test_two_caps_without_flops_use_both():
    made = plan(Budget(max_parameters=1e9, max_tokens=1e10), laws("ssm"))
    assert made.tokens == 1e10
    assert 0.85e9 < count_parameters(made.run.model).total <= 1e9


def test_a_fixed_granularity_is_kept_where_the_law_has_one():
    assert plan(Budget(flops=1e20), laws("ssm"), granularity=4).shape.granularity == 4
    with pytest.raises(ValueError, match="no granularity"):
        plan(Budget(flops=1e20), laws("dense"), granularity=4)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(flops=1e6), "too little: the optimum is .* narrower than one block"),
        (Budget(flops=1e40), "out of range"),
        (Budget(flops=1e20, max_parameters=1e5), "smallest model of law ssm"),
        (Budget(flops=1e20, max_parameters=1e8, max_tokens=1e8), "the caps contradict the budget"),
        (Budget(max_parameters=1e5, max_tokens=1e8), "smallest model of law ssm"),
    ],
)
def test_budgets_no_model_fits_are_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        plan(budget, laws("ssm"))


@pytest.mark.parametrize("option", ["granularity", "vocab_size", "context"])
def test_sizes_are_at_least_one(option):
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} 0"):
        plan(Budget(flops=1e20), laws("ssm"), **{option: 0})
