"""The rows of a table."""

import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids (...) int64 or int32, weight (vocab, d) -> weight[ids] (..., d), differentiable in weight."""
    return F.embedding(ids, weight)
