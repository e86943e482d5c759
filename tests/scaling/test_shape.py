import pytest

from ssmoe.config.count import count_parameters, training_flops
from ssmoe.scaling.published import DENSE, MOE_64, SSM, joint
from ssmoe.scaling.shape import Shape, counts, model_config, smallest_width, width_step


def test_experts_keep_their_tiles_and_the_law_sees_the_rounded_model():
    shape = Shape(320, 5, 16)
    config = model_config("mamba-moe", shape, expansion=64, vocab_size=4096)
    moe = config.pattern[1]
    # 3 * 320 / 16 = 60 becomes 64
    assert (moe.d_expert, moe.num_experts, moe.top_k) == (64, 1024, 16)
    found = counts(SSM, shape, config)
    assert found.parameters == count_parameters(config).non_embedding
    assert found.flops == training_flops(config, 1024, head=False)
    assert found.flops_with_head == training_flops(config, 1024)


def test_transformers_are_counted_as_their_papers_do():
    for law in (MOE_64, DENSE, joint(8), joint(1)):
        grain = 8 if law is MOE_64 else 1
        shape = Shape(512, 8, grain)
        config = model_config(law.blocks, shape, expansion=law.expansion, vocab_size=50257)
        assert counts(law, shape, config).flops == law.cost.flops.at(*shape)
        assert len(config.layers) == 16
    assert model_config("moe-swiglu", shape, expansion=1, vocab_size=99).pattern[1].kind == "dense"


@pytest.mark.parametrize("granularity", [1, 8, 16, 32, 64])
def test_transformer_widths_divide_into_experts_of_whole_tiles(granularity):
    step = width_step("moe", granularity)
    assert step % 64 == 0
    assert 4 * step / granularity % 16 == 0
    assert 4 * smallest_width("moe", granularity) / granularity >= 16


def test_a_width_without_heads_is_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        model_config("dense", Shape(100, 2, 1), expansion=1, vocab_size=99)
