import numpy as np
import pytest

from ssmoe.scaling.law import (
    Coefficients,
    Law,
    Range,
    extrapolations,
    load,
    loss,
    parameters,
    save,
    token_flops,
    tokens_for_loss,
)
from ssmoe.scaling.published import DENSE, MOE_64, NAMES, SSM, joint, laws


def test_loss_is_the_formula():
    n, d, g = 1e9, 2e10, 8
    expected = 0.47 + (2.1 / g**0.58 + 18.1) / n**0.115 + 30.8 / d**0.147
    assert loss(MOE_64, n, d, g) == pytest.approx(expected, rel=1e-12)
    assert loss(DENSE, n, d) == pytest.approx(0.47 + 16.3 / n**0.126 + 26.7 / d**0.127, rel=1e-12)


def test_loss_takes_arrays():
    sizes = np.array([1e8, 1e9])
    assert loss(MOE_64, sizes, 1e10, 4) == pytest.approx([loss(MOE_64, n, 1e10, 4) for n in sizes])


def test_tokens_for_loss_inverts_the_law():
    tokens = tokens_for_loss(SSM, 2.9, 5e9, 8)
    assert loss(SSM, 5e9, tokens, 8) == pytest.approx(2.9, rel=1e-12)
    assert tokens_for_loss(SSM, 1.0, 5e9, 8) == float("inf")


def test_size_and_flops_follow_the_law_s_own_count():
    assert parameters(MOE_64, 512, 8, 4) == 512**2 * 516 * 8
    assert parameters(joint(8), 512, 8) == 512 * (2 * 50257 + 13 * 512 * 8)
    assert token_flops(DENSE, 512, 8) == 72 * 512**2 * 8


def test_extrapolations_name_what_lies_outside():
    assert extrapolations(MOE_64, 1e9, 5e10, 8) == []
    phrases = extrapolations(MOE_64, 1e10, 1e9, 64)
    assert [phrase[0] for phrase in phrases] == ["N", "D", "G"]
    assert "2.7 times the largest fitted" in phrases[0]
    assert "16 times below the smallest fitted" in phrases[1]


def test_a_law_survives_its_file_even_with_open_intervals(tmp_path):
    law = Law(
        name="mine",
        source="fitted to 30 runs",
        blocks="mamba-moe",
        expansion=8,
        coefficients=Coefficients(a=3, alpha=0.2, b=4, beta=0.3, g=1, gamma=0.5, c=0.472),
        valid=Range(parameters=(1e5, 1e7), tokens=(1e6, 1e8), granularity=(1, 4)),
        rmse=0.02,
        intervals={"a": (1.0, float("inf"))},
    )
    save(law, tmp_path / "law.json")
    assert load(tmp_path / "law.json") == law


@pytest.mark.parametrize("name", NAMES)
def test_every_published_law_survives_its_file(tmp_path, name):
    for law in laws(name):
        save(law, tmp_path / "law.json")
        assert load(tmp_path / "law.json") == law


def test_a_bad_law_file_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="ssmoe fit"):
        load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="is not a law"):
        load(tmp_path / "bad.json")
