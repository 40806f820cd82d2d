"""Language modelling loss as sum and count.

Letters: B sentences, L tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sltscale.structures import LossOutput

IGNORED = -100


def label_smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> LossOutput:
    """Cross-entropy with label smoothing (``smoothing`` spread evenly over all V classes), summed over the tokens.

    logits [B, L, V]; labels int64 [B, L], -100 where there is no token. count: the tokens. Computed in at least
    float32. Metric: token_accuracy (argmax against label).
    """
    flat, targets = logits.flatten(0, 1), labels.flatten()
    wide = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
    loss_sum = F.cross_entropy(wide, targets, reduction="sum", label_smoothing=smoothing, ignore_index=IGNORED)
    with torch.no_grad():
        count = (targets != IGNORED).sum()
        correct = (flat.argmax(-1) == targets).sum()
    return LossOutput(loss_sum, count, {"token_accuracy": correct / count.clamp(min=1)})
