import pytest

from ssmoe.scaling.budget import Budget
from ssmoe.scaling.plan import plan
from ssmoe.scaling.plots import plot_budgets, plot_fit
from ssmoe.scaling.published import MOE_64, laws
from tests.scaling.synthetic import beyond, draw


@pytest.mark.parametrize("name", ["moe-64", "dense", "ssm"])
def test_budgets(tmp_path, name):
    plot_budgets(laws(name)[0], tmp_path / "plain.png")
    made = plan(Budget(flops=1e20), laws(name))
    plot_budgets(made.law, tmp_path / "deep" / "marked.svg", marked=made)
    assert (tmp_path / "plain.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "deep" / "marked.svg").read_text()


def test_a_fit_with_its_runs(tmp_path):
    plot_fit(MOE_64, draw(0), beyond(), tmp_path / "fit.png")
    plot_fit(MOE_64, draw(0)[:1], [], tmp_path / "one.png")
    assert (tmp_path / "fit.png").stat().st_size > 10_000
