"""Parameters, FLOPs and state bytes of a model from its configuration alone.

"Non-embedding" leaves out the embedding and the head, as arXiv 2401.04081 counts; "active" counts the
experts that a token takes, shared ones always. A router's balancing bias is no parameter and is counted
nowhere. FLOPs count a multiply-add as two; the scan counts 7 per state element and token (discretise 3,
update 2, read out 2) and the backward pass twice the forward.
"""

from typing import NamedTuple

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
    S4DConfig,
)

SCAN_FLOPS = 7
S4D_FLOPS = {"real": 5, "complex": 14}
"""A state element and token in recurrent mode: decay, drive, add and read out."""


class LayerCount(NamedTuple):
    """One layer without its norm. matrices: active parameters that each token is multiplied with."""

    total: int
    active: int
    matrices: int


class ModelCount(NamedTuple):
    """Parameters of a whole model; `total` every one, the others without embedding and head.

    non_embedding: layers and norms. active: the part of those that one token uses.
    """

    total: int
    non_embedding: int
    active: int


def count_parameters(config: ModelConfig) -> ModelCount:
    """Exact parameter counts; `total` equals the built model's numel."""
    layers = [count_layer(layer, config.d_model) for layer in config.layers]
    norm = _norm(config)
    norms = norm * len(layers) + (norm if config.final_norm else 0)
    head = 0 if config.tied_embeddings else config.vocab_size * (config.d_model + config.head_bias)
    non_embedding = sum(layer.total for layer in layers) + norms
    return ModelCount(
        total=config.vocab_size * config.d_model + head + non_embedding,
        non_embedding=non_embedding,
        active=sum(layer.active for layer in layers) + norms,
    )


def count_layer(layer: LayerConfig, d_model: int) -> LayerCount:
    """The parameters of one layer without its norm."""
    match layer:
        case MambaConfig():
            d_inner, rank = layer.d_inner(d_model), layer.rank(d_model)
            matrices = d_inner * (3 * d_model + 2 * rank + 2 * layer.d_state)
            # convolution and its bias, A_log, D, delta bias, and perhaps the initial state
            states = layer.d_state * (2 if layer.learned_state else 1)
            total = matrices + d_inner * (layer.d_conv + 1 + states + 2)
            return LayerCount(total, total, matrices)
        case S4DConfig():
            d_inner, parts = layer.d_inner(d_model), 1 + layer.complex
            # convolution and its bias, A and C, D and delta bias
            total = d_inner * (3 * d_model + layer.d_conv + 1 + 2 * parts * layer.d_state + 2)
            return LayerCount(total, total, 3 * d_model * d_inner)
        case AttentionConfig():
            matrices = 4 * d_model**2
            return LayerCount(matrices, matrices, matrices)
        case DenseConfig():
            matrices = (3 if layer.activation == "swiglu" else 2) * d_model * layer.d_ff
            return LayerCount(matrices, matrices, matrices)
        case MoEConfig():
            num_experts, width, num_choices = layer.bank
            expert = (3 if layer.activation == "swiglu" else 2) * d_model * width
            always = d_model * num_experts + layer.num_shared_experts * expert
            norm = 2 * d_model * layer.output_norm
            matrices = num_choices * expert + always
            return LayerCount(num_experts * expert + always + norm, matrices + norm, matrices)
        case ExpertChoiceConfig():
            num_experts, width, num_choices = layer.bank
            expert = (3 if layer.activation == "swiglu" else 2) * d_model * width
            router, norm = d_model * num_experts, 2 * d_model * layer.output_norm
            matrices = num_choices * expert + router
            return LayerCount(num_experts * expert + router + norm, matrices + norm, matrices)
        case MambaExpertsConfig():
            return _count_mamba_experts(layer, d_model)
        case ParallelConfig():
            parts = zip(count_layer(layer.mamba, d_model), count_layer(layer.moe, d_model), strict=True)
            return LayerCount(*(one + other for one, other in parts))
        case MoTConfig():
            num_experts, width, num_choices = layer.bank
            expert = (3 if layer.activation == "swiglu" else 2) * d_model * width
            router = d_model * num_experts
            total = num_experts * expert + router
            if layer.mode == "token_choice":
                return LayerCount(total, num_choices * expert + router, num_choices * expert + router)
            # an expert works once for the whole group
            active = num_experts * expert // layer.group + router
            # the products that mix and hand back cost as much as the router's
            return LayerCount(total, active, active + 2 * router)


def _count_mamba_experts(layer: MambaExpertsConfig, d_model: int) -> LayerCount:
    """Every projection joins d_model and d_inner, so that all experts have the same size."""
    mamba, d_inner = count_layer(layer.mamba, d_model), layer.mamba.d_inner(d_model)
    expert = d_model * d_inner if layer.expert == "linear" else layer.d_expert * (d_model + d_inner)
    replaced = len(layer.projections)
    # a router of its own reads what the projection reads
    inputs = [d_inner if name == "out" else d_model for name in layer.projections]
    router = layer.num_experts * (d_model if layer.routing == "shared" else sum(inputs))
    rest = -replaced * d_model * d_inner + router
    active = replaced * layer.top_k * expert + rest
    return LayerCount(
        mamba.total + replaced * layer.num_experts * expert + rest,
        mamba.active + active,
        mamba.matrices + active,
    )


def forward_flops(config: ModelConfig, context: int, *, head: bool = True) -> float:
    """Mean FLOPs a token of a forward pass over `context` tokens; `head` counts the projection to logits."""
    total = 2.0 * config.d_model * config.vocab_size if head else 0.0
    for layer in config.layers:
        total += 2.0 * count_layer(layer, config.d_model).matrices
        match layer:
            case MambaConfig():
                total += _scan_flops(layer, config.d_model)
            case MambaExpertsConfig() | ParallelConfig():
                total += _scan_flops(layer.mamba, config.d_model)
            case S4DConfig():
                scan = S4D_FLOPS[layer.parametrisation] * layer.d_state
                total += layer.d_inner(config.d_model) * (scan + 2 * layer.d_conv)
            case AttentionConfig():
                # scores and weighted values over (context + 1) / 2 tokens on average, or over all
                total += 2.0 * config.d_model * (context + 1 if layer.causal else 2 * context)
            case _:
                pass
    return total


def training_flops(config: ModelConfig, context: int, *, head: bool = True) -> float:
    """Mean FLOPs a token of forward and backward."""
    return 3 * forward_flops(config, context, head=head)


def state_bytes(config: ModelConfig, context: int, *, activation_bytes: int = 4) -> int:
    """Bytes of the recurrent state of one sequence after `context` tokens; a scan state is float32."""
    total = 0
    for layer in config.layers:
        match layer:
            case MambaConfig():
                total += _mamba_state(layer, config.d_model, activation_bytes)
            case MambaExpertsConfig() | ParallelConfig():
                total += _mamba_state(layer.mamba, config.d_model, activation_bytes)
            case S4DConfig():
                ssm = 4 * (1 + layer.complex) * layer.d_state
                total += layer.d_inner(config.d_model) * (activation_bytes * (layer.d_conv - 1) + ssm)
            case AttentionConfig():
                total += layer.causal * (2 * config.d_model * context * activation_bytes + 8)
            case _:
                pass
    return total


def _scan_flops(layer: MambaConfig, d_model: int) -> int:
    return layer.d_inner(d_model) * (SCAN_FLOPS * layer.d_state + 2 * layer.d_conv)


def _mamba_state(layer: MambaConfig, d_model: int, activation_bytes: int) -> int:
    return layer.d_inner(d_model) * (activation_bytes * (layer.d_conv - 1) + 4 * layer.d_state)


def _norm(config: ModelConfig) -> int:
    return config.d_model * (2 if config.norm == "layernorm" else 1)
