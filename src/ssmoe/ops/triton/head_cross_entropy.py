"""The head's cross-entropy on the GPU is the reference's."""

from ssmoe.ops.reference.head_cross_entropy import head_cross_entropy

__all__ = ["head_cross_entropy"]
