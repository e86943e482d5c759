import pytest

from ssmoe.scaling.hardware import GPUS, gpu


def test_a_gpu_is_found_in_any_case():
    assert gpu("a100-80gb") is GPUS["A100-80GB"]


def test_an_unknown_gpu_names_the_nearest_and_the_rest():
    with pytest.raises(ValueError, match=r"did you mean RTX4090\? Known: B200, .*--flops"):
        gpu("RTX4080")


def test_a_gpu_like_no_other_names_them_all():
    with pytest.raises(ValueError, match=r"unknown GPU 'abacus'\. Known: B200, "):
        gpu("abacus")
