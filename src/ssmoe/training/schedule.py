"""The learning rate at a step: linear warm-up, then one of four ways down to a fraction of the peak."""

from math import cos, pi, sqrt

from ssmoe.config.train import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of optimiser step `step`, counted from 0; the last step is train.steps - 1."""
    warmup = round(train.warmup_fraction * train.steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, train.steps - 1 - warmup)
    low = train.final_learning_rate_ratio
    return train.learning_rate * (low + (1 - low) * _remaining(train, min(1.0, progress)))


def _remaining(train: TrainConfig, progress: float) -> float:
    """What is left of peak minus final rate, from 1 at progress 0 to 0 at progress 1."""
    match train.schedule:
        case "cosine":
            return (1 + cos(pi * progress)) / 2
        case "linear":
            return 1 - progress
        case "wsd":
            return 1 - sqrt(max(0.0, 1 - (1 - progress) / train.decay_fraction))
        case "constant":
            return 1.0
