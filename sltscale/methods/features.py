"""C2RL's second stage (arXiv 2408.09949 IV-B): the visual encoder, whose tokens of every clip are written down."""

from __future__ import annotations

from torch import Tensor

from sltscale.config import FeatureSettings
from sltscale.methods.base import Method, Vocabulary
from sltscale.models.visual import VisualEncoder
from sltscale.structures import Features, LossOutput, TextBatch, VideoBatch


class FeatureExtraction(Method):
    """Nothing but ``visual``; without a loss, since nothing is trained."""

    def __init__(self, settings: FeatureSettings, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.weights = {}
        self.visual = VisualEncoder(settings.visual)

    def encode(
        self, batch: VideoBatch, text: TextBatch, *, features_only: bool
    ) -> tuple[dict[str, LossOutput], Features]:
        return {}, Features()

    def counts(self, text: TextBatch) -> dict[str, Tensor]:
        return {}
