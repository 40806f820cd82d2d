"""Language modelling loss as sum and count.

Letters: B sentences, L tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sltscale.structures import LossOutput

IGNORED = -100
CHUNK_ELEMENTS = 2**24  # logits that a chunk may hold (64 MiB in float32), though never less than one token's


def label_smoothed_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float, *, chunk_elements: int = CHUNK_ELEMENTS
) -> LossOutput:
    """Cross-entropy with label smoothing (``smoothing`` spread evenly over all V classes), summed over the tokens.

    logits [B, L, V]; labels int64 [B, L], -100 where there is no token. count: the tokens. Computed in at least
    float32, chunk by chunk: what a chunk needs besides its logits is thrown away and computed once more in the backward
    pass, so of all logits there is nothing but themselves and their gradient, in their own dtype. Metric:
    token_accuracy (argmax against label).
    """
    flat, targets = logits.flatten(0, 1), labels.flatten()
    rows = max(1, chunk_elements // flat.shape[1])

    def summed(some: Tensor, wanted: Tensor) -> Tensor:
        wide = some.float() if some.dtype in (torch.bfloat16, torch.float16) else some
        return F.cross_entropy(wide, wanted, reduction="sum", label_smoothing=smoothing, ignore_index=IGNORED)

    parts = [
        checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(flat.split(rows), targets.split(rows), strict=True)
    ]
    with torch.no_grad():
        count = (targets != IGNORED).sum()
        correct = (flat.argmax(-1) == targets).sum()
    return LossOutput(torch.stack(parts).sum(), count, {"token_accuracy": correct / count.clamp(min=1)})
