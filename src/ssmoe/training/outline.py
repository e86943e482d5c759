"""What a run is about to do, in two lines."""

from ssmoe.config.count import count_parameters, training_flops
from ssmoe.config.load import RunConfig


def outline(run: RunConfig, *, text_tokens: int, backend: str, device: str) -> list[str]:
    """Sizes and memory; tokens, passes over the `text_tokens` of the training text, FLOPs and kernels.

    FLOPs as `ssmoe presets` counts them. Memory is what every step keeps: float32 weights, gradients and the
    two means of AdamW; activations come on top.
    """
    count = count_parameters(run.model)
    length = run.data.context * (run.train.tbptt or 1)
    tokens = run.train.steps * run.train.batch_size * length
    flops = tokens * training_flops(run.model, run.data.context)
    return [
        f"{run.name}: {count.total:,} parameters, {count.active:,} active in {len(run.model.layers)} layers; "
        f"{16 * count.total / 1e9:.2g} GB for weights, gradients and optimiser, activations on top",
        f"{run.train.steps:,} steps of {run.train.batch_size} rows of {length} tokens: {tokens:,} tokens, "
        f"{tokens / text_tokens:.2g} times the text, {flops:.2g} FLOPs; backend {backend} on {device}, "
        f"{run.train.precision}",
    ]
