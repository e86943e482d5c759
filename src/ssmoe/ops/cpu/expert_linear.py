"""The bank of linear maps: the reference's, as it is.

Torch runs each expert's product with its own threaded library, which a kernel of ours would not beat.
"""

from ssmoe.ops.reference.expert_linear import expert_linear

__all__ = ["expert_linear"]
