"""Model configurations: derived sizes, and refusals that name the remedy."""

import pytest
from pydantic import ValidationError

from ssmoe.config.model import AttentionConfig, MambaConfig, ModelConfig, MoEConfig


def test_layers_repeat_the_pattern() -> None:
    config = ModelConfig(
        vocab_size=9, d_model=8, pattern=(MambaConfig(), MoEConfig(num_experts=2, d_expert=4)), repeat=3
    )
    assert [layer.kind for layer in config.layers] == ["mamba", "moe"] * 3


@pytest.mark.parametrize(("expand", "d_inner"), [(2, 1024), (2 / 3, 341), (4 / 3, 683)])
def test_expansions_of_the_ratio_ablation(expand: float, d_inner: int) -> None:
    assert MambaConfig(expand=expand).d_inner(512) == d_inner


def test_rank_is_a_sixteenth_rounded_up() -> None:
    assert MambaConfig().rank(512) == 32
    assert MambaConfig().rank(65) == 5
    assert MambaConfig(dt_rank=7).rank(512) == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"pattern": [{"kind": "attention", "num_heads": 3}]},
            "num_heads=3 does not divide d_model=8: use num_heads=2",
        ),
        ({"pattern": [{"kind": "attention", "num_heads": 8}]}, "even head width"),
        (
            {"pattern": [{"kind": "moe", "num_experts": 2, "d_expert": 4, "top_k": 3}]},
            "lower top_k to at most 2",
        ),
        (
            {"pattern": [{"kind": "moe", "num_experts": 2, "d_expert": 10, "granularity": 4}]},
            "granularity=4 does not divide d_expert=10: use d_expert=8 or 12",
        ),
        (
            {"pattern": [{"kind": "moe", "num_experts": 2, "d_expert": 4, "normalise_weights": True}]},
            "makes every weight 1",
        ),
        (
            {"pattern": [{"kind": "mot", "num_experts": 2, "d_expert": 4, "top_k": 3}]},
            "lower top_k to at most 2",
        ),
        (
            {"pattern": [{"kind": "expert_choice", "num_experts": 2, "d_expert": 10, "granularity": 4}]},
            "granularity=4 does not divide d_expert=10",
        ),
        ({"pattern": [{"kind": "mamba", "dt_min": 0.2}]}, "dt_min=0.2 is above dt_max=0.1"),
        ({"pattern": []}, "at least 1"),
        ({"pattern": [{"kind": "mamba2"}]}, "mamba2"),
        ({"head_bias": True}, "tied_embeddings=false"),
        ({"d_modle": 4}, "d_modle"),
        ({"vocab_size": 0}, "greater than 0"),
    ],
)
def test_refusals(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({"vocab_size": 9, "d_model": 8, "pattern": [{"kind": "mamba"}], **values})


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        AttentionConfig(num_heads=2).num_heads = 4  # pyright: ignore[reportAttributeAccessIssue]
