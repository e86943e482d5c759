"""The layout of the official mamba-ssm package: config.json with d_model, n_layer and ssm_cfg."""

from typing import Any

from ssmoe.config.model import MambaConfig, ModelConfig

EMBEDDING = "backbone.embedding.weight"


def model_config(config: dict[str, Any]) -> ModelConfig:
    """Our configuration of an official one. Raises ValueError for what our Mamba does not have."""
    ssm: dict[str, Any] = dict(config.get("ssm_cfg") or {})
    if ssm.pop("layer", "Mamba1") != "Mamba1":
        raise ValueError("the checkpoint is of Mamba2 layers: only Mamba1 can be imported")
    if config.get("attn_layer_idx"):
        raise ValueError("the checkpoint has attention layers: only plain Mamba can be imported")
    if config.get("d_intermediate"):
        raise ValueError("the checkpoint has feed-forward layers: only plain Mamba can be imported")
    # the vocabulary is padded when the model is built, not in the file
    multiple = config.get("pad_vocab_size_multiple", 8)
    tied = config.get("tie_embeddings", True)
    fields = {name: ssm.pop(name) for name in ("d_state", "d_conv", "expand", "dt_rank") if name in ssm}
    # these decide only how fresh weights are drawn, or which kernel computes
    for name in ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"):
        ssm.pop(name, None)
    if ssm.pop("conv_bias", True) is False or ssm.pop("bias", False) or ssm:
        raise ValueError(f"ssm_cfg of the checkpoint asks for what our Mamba lacks: {config['ssm_cfg']}")
    return ModelConfig(
        vocab_size=-(-config["vocab_size"] // multiple) * multiple,
        d_model=config["d_model"],
        pattern=(MambaConfig(**fields),),
        repeat=config["n_layer"],
        norm="rmsnorm" if config.get("rms_norm", True) else "layernorm",
        residual_float32=config.get("residual_in_fp32", True),
        tied_embeddings=tied,
    )
