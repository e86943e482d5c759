import pytest

from ssmoe.config.count import count_parameters, training_flops
from ssmoe.scaling.design import check_design
from ssmoe.scaling.ladder import ladder
from ssmoe.scaling.runs import Point


def cost(run):
    tokens = run.train.steps * run.train.batch_size * run.data.context
    return tokens * training_flops(run.model, run.data.context)


def test_a_ladder_costs_its_budget_and_can_be_fitted():
    made = ladder(1e15)
    assert len(made.fitted) >= 20
    assert len(made.held_out) >= 4
    assert sum(cost(run) for run in (*made.fitted, *made.held_out)) == pytest.approx(1e15, rel=0.02)
    points = [
        Point(
            run.name,
            count_parameters(run.model).non_embedding,
            run.train.steps * run.train.batch_size * run.data.context,
            run.model.pattern[1].top_k,
            3.0,
        )
        for run in made.fitted
    ]
    check_design(points, form="fine-grained", c=0.472)


def test_held_out_runs_are_larger_than_every_fitted_one():
    made = ladder(1e15)
    largest = max(count_parameters(run.model).active for run in made.fitted)
    assert all(count_parameters(run.model).active > largest for run in made.held_out)
    assert max(map(cost, made.held_out)) > max(map(cost, made.fitted))


def test_names_differ_and_only_sizes_vary():
    runs = ladder(1e15, widths=(64, 128), granularities=(1, 2, 8)).fitted
    assert len({run.name for run in runs}) == len(runs) == 2 * 3 * 4
    assert len({(run.train.batch_size, run.data, run.model.vocab_size) for run in runs}) == 1


def test_levels_are_the_ratios_of_tokens():
    made = ladder(1e15, widths=(64, 128), levels=(1, 1.5, 3), held_out_levels=(6,))
    base = made.fitted[0].train.steps
    steps = {run.name[-4:].lstrip("-"): run.train.steps / base for run in (*made.fitted, *made.held_out)}
    assert steps == pytest.approx({"t01": 1, "t1.5": 1.5, "t03": 3, "t06": 6}, rel=0.01)
    assert len(made.held_out) == 2


def test_wide_mamba_models_learn_more_slowly():
    rates = {run.model.d_model: run.train.learning_rate for run in ladder(1e16, widths=(64, 256)).fitted}
    assert rates == {64: 0.01, 256: 0.0056}


@pytest.mark.parametrize("blocks", ["moe", "dense"])
def test_transformer_ladders(blocks):
    grains = (1,) if blocks == "dense" else (1, 2, 4)
    made = ladder(1e15, blocks=blocks, granularities=grains)
    assert made.fitted[0].model.pattern[0].kind == "attention"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flops": 0}, "positive"),
        ({"flops": 1e10}, "too little for 52 runs.*give at least"),
        ({"expansion": 0}, "--expansion 0"),
        ({"widths": (64,)}, "at least two model sizes"),
        ({"widths": (64, 100)}, "multiples of 16"),
        ({"granularities": (1, 2)}, "at least three"),
        ({"levels": (2,)}, "--levels 2: a law needs at least two"),
        ({"levels": (0.5, 2)}, "--levels 0.5: levels are multiples"),
        ({"held_out_levels": (4, 1e4)}, "--held-out-levels 10000"),
        ({"granularities": (1, 2, 64)}, "under 16"),
    ],
)
def test_ladders_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ladder(**{"flops": 1e15, **options})
