"""The bank of linear maps: the reference's, as it is.

There is no kernel of its own yet: torch's product for each expert, which waits for the counts.
"""

from ssmoe.ops.reference.expert_linear import expert_linear

__all__ = ["expert_linear"]
