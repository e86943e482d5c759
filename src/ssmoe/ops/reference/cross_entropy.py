"""Cross-entropy of a chunk of logits and its gradient, together: the head keeps neither for later."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target that is not predicted."""


def cross_entropy(logits: Tensor, targets: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """-log softmax(logits)[target] of each row (t,), float32 or wider, and its gradient (t, vocab).

    logits: (t, vocab), any floating dtype, which becomes the gradient's; they may be overwritten. targets:
    (t,) int64, `IGNORE` where nothing is predicted: loss and gradient are zero there. gradient: False
    leaves it out (None). Not differentiable.
    """
    with torch.no_grad():
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_p = F.log_softmax(logits, dim=-1, dtype=dtype)
        loss = F.nll_loss(log_p, targets, ignore_index=IGNORE, reduction="none")
        if not gradient:
            return loss, None
        index = targets.clamp(min=0).unsqueeze(1)
        at_target = torch.expm1(log_p.gather(1, index)).to(logits.dtype)  # softmax - 1, exact near 0
        # in the place of what is not needed any more
        out = log_p if log_p.dtype == logits.dtype else torch.empty_like(logits)
        dlogits = torch.exp(log_p, out=out).scatter_(1, index, at_target)
        return loss, dlogits.index_fill_(0, (targets == IGNORE).nonzero().squeeze(1), 0)
