"""Configuration + kernels -> model: the one match over layer kinds."""

import torch
from torch import nn

from ssmoe.config.count import count_parameters
from ssmoe.config.model import (
    AttentionConfig,
    DenseConfig,
    ExpertChoiceConfig,
    LayerConfig,
    MambaConfig,
    MambaExpertsConfig,
    ModelConfig,
    MoEConfig,
    MoTConfig,
    ParallelConfig,
    Projection,
    RoutingConfig,
    S4DConfig,
)
from ssmoe.model.feedforwards.dense import Dense
from ssmoe.model.feedforwards.expert_choice import ExpertChoice
from ssmoe.model.feedforwards.moe import Experts, MoE
from ssmoe.model.feedforwards.mot import MixtureOfTokens
from ssmoe.model.feedforwards.router import Router
from ssmoe.model.init import init_weights
from ssmoe.model.layer import check_dtype
from ssmoe.model.lm import LM, Residual
from ssmoe.model.mixers.attention import Attention
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.model.mixers.mamba_experts import LinearExperts, MambaExperts, NetworkExperts
from ssmoe.model.mixers.parallel import Parallel
from ssmoe.model.mixers.s4d import S4D
from ssmoe.model.norm import LayerNorm, Linear, RMSNorm, use_products
from ssmoe.ops import Ops, load
from ssmoe.ops.device import check_home, resolve_device

_MOST_PARAMETERS = 1 << 48


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
    CPU, "auto" a GPU where there is one; "meta" builds shapes without memory. dtype: the compute dtype,
    float32, bfloat16 or (on a CPU) float64, None for the parameters' float32.
    Raises ValueError for a device that is not there, a backend whose kernels do not run on it, another dtype
    and sizes that no memory holds.
    """
    if not hasattr(config, "layers"):
        raise TypeError(
            f"build takes a ModelConfig, not {type(config).__name__}: ssmoe.preset(NAME).model is one"
        )
    check_dtype(dtype)
    if (total := count_parameters(config).total) >= _MOST_PARAMETERS:
        raise ValueError(f"the model has {total:.2g} parameters, more than any memory holds: lower its sizes")
    device = resolve_device(device)
    ops = load(backend, "cpu" if device.type == "meta" else device.type)
    if device.type != "meta":
        check_home(ops.name, device.type)
    with torch.device("meta"):
        layers = [Residual(_norm(config), _layer(layer, config.d_model, ops), ops) for layer in config.layers]
        final_norm = _norm(config) if config.final_norm else None
        model = LM(config, layers, final_norm, ops=ops, compute_dtype=dtype)
    use_products(model, ops)
    if device.type != "meta":
        model.to_empty(device=device)
        init_weights(model, init=config.init, seed=seed, num_layers=len(config.layers))
    return model


def _layer(layer: LayerConfig, d_model: int, ops: Ops) -> nn.Module:
    match layer:
        case MambaConfig():
            return _mamba(layer, d_model, ops)
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
                ops=ops,
            )
        case DenseConfig():
            return Dense(d_model, d_ff=layer.d_ff, activation=layer.activation)
        case MoEConfig():
            return _moe(layer, d_model, ops)
        case ExpertChoiceConfig():
            return ExpertChoice(
                d_model,
                router=_router(layer, d_model, layer.bank[0], layer.bank[2], ops),
                experts=_experts(layer, d_model, ops),
                output_norm=layer.output_norm,
                group=layer.group,
                mode=layer.mode,
            )
        case MoTConfig():
            return MixtureOfTokens(
                router=_router(layer, d_model, layer.bank[0], layer.bank[2], ops),
                experts=_experts(layer, d_model, ops),
                group=layer.group,
                axis=layer.axis,
                temperature=layer.temperature,
                mode=layer.mode,
            )
        case MambaExpertsConfig():
            return _mamba_experts(layer, d_model, ops)
        case ParallelConfig():
            return Parallel(_mamba(layer.mamba, d_model, ops), _moe(layer.moe, d_model, ops))


def _mamba(layer: MambaConfig, d_model: int, ops: Ops) -> Mamba:
    return Mamba(
        d_model,
        d_state=layer.d_state,
        d_conv=layer.d_conv,
        expand=layer.expand,
        dt_rank=layer.dt_rank,
        dt_min=layer.dt_min,
        dt_max=layer.dt_max,
        learned_state=layer.learned_state,
        ops=ops,
    )


def _moe(layer: MoEConfig, d_model: int, ops: Ops) -> MoE:
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


def _mamba_experts(layer: MambaExpertsConfig, d_model: int, ops: Ops) -> MambaExperts:
    mamba, d_inner = layer.mamba, layer.mamba.d_inner(d_model)
    projections: dict[Projection, Linear | LinearExperts | NetworkExperts] = {}
    ends: tuple[tuple[Projection, int, int], ...] = (
        ("conv", d_model, d_inner),
        ("gate", d_model, d_inner),
        ("out", d_inner, d_model),
    )
    routers: dict[str, Router] = {}
    if layer.routing == "shared":
        routers["shared"] = _router(layer, d_model, layer.num_experts, layer.top_k, ops)
    for name, d_in, d_out in ends:
        if name not in layer.projections:
            projections[name] = Linear(d_in, d_out)
            continue
        if layer.routing == "separate":
            routers[f"for_{name}"] = _router(layer, d_in, layer.num_experts, layer.top_k, ops)
        if layer.expert == "linear":
            projections[name] = LinearExperts(d_in, d_out, num_experts=layer.num_experts, ops=ops)
        else:
            projections[name] = NetworkExperts(
                d_in,
                d_out,
                num_experts=layer.num_experts,
                d_expert=layer.d_expert,
                squared=layer.activation == "relu_squared",
                ops=ops,
            )
    return MambaExperts(
        d_inner=d_inner,
        d_state=mamba.d_state,
        d_conv=mamba.d_conv,
        dt_rank=mamba.rank(d_model),
        delta_range=(mamba.dt_min, mamba.dt_max),
        projections=projections,
        routers=routers,
        learned_state=mamba.learned_state,
        ops=ops,
    )


def _experts(layer: ExpertChoiceConfig | MoTConfig, d_model: int, ops: Ops) -> Experts:
    num_experts, width, _ = layer.bank
    return Experts(d_model, num_experts=num_experts, d_expert=width, activation=layer.activation, ops=ops)


def _router(layer: RoutingConfig, d_model: int, num_experts: int, num_choices: int, ops: Ops) -> Router:
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
        ops=ops,
    )


def _norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    kind = LayerNorm if config.norm == "layernorm" else RMSNorm
    return kind(config.d_model, config.norm_eps)
