import json

from ssmoe.scaling.budget import Budget
from ssmoe.scaling.explain import as_dict, explain, saving_over_dense, warnings
from ssmoe.scaling.plan import plan
from ssmoe.scaling.published import laws


def test_five_lines_with_the_saving_beside_the_paper_s():
    lines = explain(plan(Budget(flops=1e20), laws("moe-64")))
    assert [line.split()[0] for line in lines] == ["budget", "model", "data", "loss", "cost"]
    assert "a dense Transformer needs 21.4 times the FLOPs (the paper says 20)" in lines[3]
    lines = explain(plan(Budget(flops=1e25), laws("moe-64")))
    assert "32.0 times the FLOPs (the paper says more than 40)" in lines[3]
    for budget in (Budget(flops=1e22), Budget(flops=1e20, memory_gb=100)):
        assert "the paper" not in explain(plan(budget, laws("moe-64")))[3]


def test_extrapolation_and_borrowed_coefficients_are_warned_of():
    assert warnings(plan(Budget(max_parameters=2e9, max_tokens=3e10), laws("moe-64"))) == []
    found = warnings(plan(Budget(flops=1e22), laws("ssm")))
    assert found[0].startswith("extrapolation: N = ")
    assert "fitted on Transformers" in found[1]


def test_numbers_are_json():
    made = plan(Budget(gpu="H200", hours=2, mfu=0.4), laws("joint"))
    values = json.loads(json.dumps(as_dict(made), allow_nan=False))
    assert values["law"] == "joint"
    assert values["seconds"] == made.seconds
    assert values["run"]["model"]["d_model"] == made.shape.d_model


def test_dense_laws_have_no_saving():
    assert saving_over_dense(plan(Budget(flops=1e19), laws("dense"))) is None
