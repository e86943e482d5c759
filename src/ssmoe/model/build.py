"""Configuration + kernels -> model: the one match over layer kinds."""

import torch
from torch import nn

from ssmoe.config.model import (
    AttentionConfig,
    DenseConfig,
    ExpertChoiceConfig,
    LayerConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    MoTConfig,
    RoutingConfig,
    S4DConfig,
)
from ssmoe.model.feedforwards.dense import Dense
from ssmoe.model.feedforwards.expert_choice import ExpertChoice
from ssmoe.model.feedforwards.moe import Experts, MoE
from ssmoe.model.feedforwards.mot import MixtureOfTokens
from ssmoe.model.feedforwards.router import Router
from ssmoe.model.init import init_weights
from ssmoe.model.lm import LM, Residual
from ssmoe.model.mixers.attention import Attention
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.model.mixers.s4d import S4D
from ssmoe.model.norm import LayerNorm, RMSNorm
from ssmoe.ops import Ops, load


def build(
    config: ModelConfig,
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> LM:
    """A freshly initialised model; the same seed gives the same weights on every device.

    backend: "auto" or a name of `ssmoe.ops.BACKENDS`, fixed here for the model's life. device: None is the
    CPU; "meta" builds shapes without memory. dtype: the compute dtype, None for the parameters' float32.
    """
    device = torch.device("cpu" if device is None else device)
    ops = load(backend, "cpu" if device.type == "meta" else device.type)
    with torch.device("meta"):
        layers = [Residual(_norm(config), _layer(layer, config.d_model, ops)) for layer in config.layers]
        final_norm = _norm(config) if config.final_norm else None
        model = LM(config, layers, final_norm, backend=ops.name, compute_dtype=dtype)
    if device.type != "meta":
        model.to_empty(device=device)
        init_weights(model, init=config.init, seed=seed, num_layers=len(config.layers))
    return model


def _layer(layer: LayerConfig, d_model: int, ops: Ops) -> nn.Module:
    match layer:
        case MambaConfig():
            return Mamba(
                d_model,
                d_state=layer.d_state,
                d_conv=layer.d_conv,
                expand=layer.expand,
                dt_rank=layer.dt_rank,
                dt_min=layer.dt_min,
                dt_max=layer.dt_max,
                ops=ops,
            )
        case S4DConfig():
            return S4D(
                d_model,
                d_state=layer.d_state,
                parametrisation=layer.parametrisation,
                d_conv=layer.d_conv,
                expand=layer.expand,
                dt_min=layer.dt_min,
                dt_max=layer.dt_max,
                ops=ops,
            )
        case AttentionConfig():
            return Attention(
                d_model,
                num_heads=layer.num_heads,
                rope=layer.rope,
                rope_base=layer.rope_base,
                causal=layer.causal,
            )
        case DenseConfig():
            return Dense(d_model, d_ff=layer.d_ff, activation=layer.activation)
        case MoEConfig():
            return MoE(
                d_model,
                num_experts=layer.num_experts,
                d_expert=layer.d_expert,
                top_k=layer.top_k,
                granularity=layer.granularity,
                num_shared_experts=layer.num_shared_experts,
                activation=layer.activation,
                output_norm=layer.output_norm,
                capacity_factor=layer.capacity_factor,
                score=layer.score,
                normalise_weights=layer.normalise_weights,
                weight_scale=layer.weight_scale,
                balance=layer.balance,
                balance_coefficient=layer.balance_coefficient,
                bias_update=layer.bias_update,
                bias_rate=layer.bias_rate,
                z_coefficient=layer.z_coefficient,
                jitter=layer.jitter,
                ops=ops,
            )
        case ExpertChoiceConfig():
            num_experts, width, num_choices = layer.bank
            return ExpertChoice(
                d_model,
                router=_router(layer, d_model, num_experts, num_choices),
                experts=Experts(
                    d_model, num_experts=num_experts, d_expert=width, activation=layer.activation, ops=ops
                ),
                output_norm=layer.output_norm,
                group=layer.group,
                mode=layer.mode,
            )
        case MoTConfig():
            num_experts, width, num_choices = layer.bank
            return MixtureOfTokens(
                router=_router(layer, d_model, num_experts, num_choices),
                experts=Experts(
                    d_model, num_experts=num_experts, d_expert=width, activation=layer.activation, ops=ops
                ),
                group=layer.group,
                axis=layer.axis,
                temperature=layer.temperature,
                mode=layer.mode,
            )


def _router(layer: RoutingConfig, d_model: int, num_experts: int, num_choices: int) -> Router:
    return Router(
        d_model,
        num_experts=num_experts,
        top_k=num_choices,
        score=layer.score,
        normalise_weights=layer.normalise_weights,
        weight_scale=layer.weight_scale,
        balance=layer.balance,
        balance_coefficient=layer.balance_coefficient,
        bias_update=layer.bias_update,
        bias_rate=layer.bias_rate,
        z_coefficient=layer.z_coefficient,
        jitter=layer.jitter,
    )


def _norm(config: ModelConfig) -> nn.Module:
    kind = LayerNorm if config.norm == "layernorm" else RMSNorm
    return kind(config.d_model, config.norm_eps)
