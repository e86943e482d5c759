"""The learning rate at a step: linear warm-up, then a cosine to a fraction of the peak."""

from math import cos, pi

from ssmoe.config.train import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of optimiser step `step`, counted from 0; the last step is train.steps - 1."""
    warmup = round(train.warmup_fraction * train.steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, train.steps - 1 - warmup)
    low = train.final_learning_rate_ratio
    return train.learning_rate * (low + (1 - low) * (1 + cos(pi * min(1.0, progress))) / 2)
