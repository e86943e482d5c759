from itertools import product

import pytest

from ssmoe.config.count import count_parameters, training_flops
from ssmoe.scaling.cost import block_cost
from ssmoe.scaling.shape import Shape, model_config


@pytest.mark.parametrize(
    ("d_model", "num_blocks", "granularity", "expansion"),
    list(product((128, 512, 1024), (2, 8), (1, 2, 4, 8), (1, 8, 64))),
)
def test_mamba_law_and_count_agree_on_parameters_and_flops(d_model, num_blocks, granularity, expansion):
    shape = Shape(d_model, num_blocks, granularity)
    config = model_config("mamba-moe", shape, expansion=expansion, vocab_size=4096)
    cost, counted = block_cost("mamba-moe", expansion), count_parameters(config)

    assert config.pattern[1].num_experts == expansion * granularity
    assert config.pattern[1].top_k == granularity
    assert cost.total.at(*shape) == counted.non_embedding
    assert cost.active.at(*shape) == counted.active
    for context in (1, 1024):
        assert cost.flops.at(*shape) == training_flops(config, context, head=False)


def test_dense_and_moe_transformers_count_as_the_paper_does():
    d, n, e, g = 512, 8, 64, 4
    moe = block_cost("moe", e)
    assert moe.total.at(d, n, g) == d**2 * (8 * e + 4) * n
    assert moe.flops.at(d, n, g) == (12 * d**2 * 6 + d * e * g * 14) * n
    assert block_cost("dense", 1).flops.at(d, n, 1) == 6 * 12 * d**2 * n


def test_paper_counts_differ_from_ours_only_by_what_it_leaves_out():
    shape = Shape(1024, 16, 4)
    config = model_config("moe", shape, expansion=64, vocab_size=4096)
    cost = block_cost("moe", 64)
    routers_and_norms = 16 * (1024 * 256 + 2 * 1024) + 1024
    assert cost.total.at(*shape) == count_parameters(config).non_embedding - routers_and_norms


def test_joint_law_counts_embeddings_and_six_flops_an_active_parameter():
    cost = block_cost("moe-swiglu", 8)
    assert cost.total.at(512, 8, 1) == 2 * 512 * 50257 + (4 + 9 * 8) * 8 * 512**2
    assert cost.flops.at(512, 8, 1) == 6 * cost.active.at(512, 8, 1)
