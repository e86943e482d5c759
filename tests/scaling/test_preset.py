import pytest

from ssmoe.config.load import load_run, preset, preset_names
from ssmoe.scaling.budget import Budget
from ssmoe.scaling.plan import plan
from ssmoe.scaling.preset import to_toml, write_preset
from ssmoe.scaling.published import NAMES, laws


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_s_preset_loads_as_the_same_run(tmp_path, name):
    made = plan(Budget(flops=1e18), laws(name), name="mine")
    write_preset(made.run, tmp_path / "mine.toml")
    assert load_run(str(tmp_path / "mine.toml")) == made.run


def test_every_shipped_preset_survives(tmp_path):
    for name in preset_names():
        path = tmp_path / f"{name}.toml"
        path.write_text(to_toml(preset(name)))
        assert load_run(str(path)) == preset(name)


def test_nothing_is_overwritten(tmp_path):
    run = preset("demo")
    write_preset(run, tmp_path / "deep" / "demo.toml")
    with pytest.raises(ValueError, match="exists"):
        write_preset(run, tmp_path / "deep" / "demo.toml")
    with pytest.raises(ValueError, match=r"demo\.toml"):
        write_preset(run, tmp_path / "demo.json")
