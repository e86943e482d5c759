"""The layout of Hugging Face transformers: config.json with model_type "mamba"."""

from typing import Any

from ssmoe.config.model import MambaConfig, ModelConfig

EMBEDDING = "backbone.embeddings.weight"


def model_config(config: dict[str, Any]) -> ModelConfig:
    """Our configuration of a transformers one. Raises ValueError for what our Mamba does not have."""
    if config.get("model_type") != "mamba":
        raise ValueError(f'model_type {config.get("model_type")!r} cannot be imported: only "mamba" can')
    for key, ours in (("use_bias", False), ("use_conv_bias", True), ("hidden_act", "silu")):
        if config.get(key, ours) != ours:
            raise ValueError(f"the checkpoint has {key}={config[key]}: our Mamba has {key}={ours} alone")
    d_model, rank = config["hidden_size"], config.get("time_step_rank", "auto")
    expand = config.get("intermediate_size", config.get("expand", 2) * d_model) / d_model
    return ModelConfig(
        vocab_size=config["vocab_size"],
        d_model=d_model,
        pattern=(
            MambaConfig(
                d_state=config.get("state_size", 16),
                d_conv=config.get("conv_kernel", 4),
                expand=expand,
                dt_rank=rank,
            ),
        ),
        repeat=config["num_hidden_layers"],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        residual_float32=config.get("residual_in_fp32", True),
        tied_embeddings=config.get("tie_word_embeddings", True),
    )
